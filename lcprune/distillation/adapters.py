"""Low-rank adapters on the student's projections (LoRA, arXiv:2106.09685), and how they survive a merge.

    W + alpha / rank * B A        W frozen, A [rank, inputs] and B [outputs, rank] trained, B = 0 at first

Factors of different layers cannot be merged one by one: B_1 A_1 + B_2 A_2 is not (B_1 + B_2) (A_1 + A_2). So planners,
operators and refits never see any. `plain` stands the projections W + alpha / rank * B A in for the adapted ones; what
is changed meanwhile becomes the new W, and its adapter starts afresh, the same Parameters at B = 0. What is not changed
gets back its W, bit for bit the teacher's, and keeps its adapter.

peft wraps the single projections, so that the model stays of its Hugging Face class. With `base: nf4` the W are packed
into 4 bit (quantized.py) and are unpacked for as long as a block of `plain` lasts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lcprune.distillation import quantized
from lcprune.distillation.head import LowRank
from lcprune.distillation.trained import Trained, is_adapter, trains_adapters
from lcprune.errors import InputError
from lcprune.merging.architectures import LayerLayout, layout_of
from lcprune.merging.surgery import Outcome

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer  # importing peft takes seconds

NAME = "default"
"""What peft calls the one adapter of a projection."""
HEAD = "lm_head"
"""The target that means the output layer, whatever a family calls it."""


@dataclass(frozen=True)
class Lora:
    """Adapters on the projections of every decoder layer, for `train: lora` and its kin."""

    rank: int = 16
    """Rank of every adapter; memory and time of what is trained grow with it."""
    alpha: float = 32.0
    """The adapter counts alpha / rank times."""
    dropout: float = 0.0
    """Fraction of the adapter's inputs that is dropped in training."""
    targets: list[str] | None = None
    """Projections with an adapter, such as [q_proj, v_proj]; null = all of attention and MLP. `lm_head` is the output
    layer, whatever the family calls it; its adapter is trained beside any others."""
    base: Literal["full", "nf4"] = "full"
    """What the frozen projections are held in: `full` = model.dtype, shared with the teacher where that has the same;
    `nf4` = 4 bit (QLoRA), computed in model.dtype, which is also what they are unpacked to while layers merge."""

    def __post_init__(self) -> None:
        wrong = []
        if self.rank < 1:
            wrong.append(f"rank={self.rank} must be at least 1")
        if not self.alpha > 0:
            wrong.append(f"alpha={self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout={self.dropout} must lie in [0, 1)")
        if self.targets is not None and not self.targets:
            wrong.append("targets=[] must name at least one projection, or be null for all")
        if self.adapts_head and self.dropout:
            wrong.append(
                f"dropout={self.dropout} must be 0 with lm_head among targets, whose loss is taken in one piece"
            )
        if self.base not in ("full", "nf4"):
            wrong.append(f"base={self.base!r} must be full or nf4")
        if wrong:
            raise InputError(f"model.lora: {'; '.join(wrong)}.")

    @property
    def adapts_head(self) -> bool:
        """Whether the output layer gets an adapter."""
        return HEAD in (self.targets or ())

    def projections(self, layout: LayerLayout) -> list[str]:
        """The modules inside a layer that get an adapter; raises InputError for targets that the family lacks."""
        branches = [branch for branch in (layout.attention, layout.mlp) if branch is not None]
        known = [name for branch in branches for name in (*(p.name for p in branch.producers), branch.consumer)]
        if self.targets is None:
            return known
        chosen = [name for name in known if {name, name.rpartition(".")[2]} & set(self.targets)]
        matched = {name for full in chosen for name in (full, full.rpartition(".")[2])}
        if missing := [target for target in self.targets if target not in {*matched, HEAD}]:
            raise InputError(
                f"model.lora.targets: a layer of {layout.model_type} has no projection {', '.join(missing)}; "
                f"choose among {', '.join(known)}, or leave targets out for all of them."
            )
        return chosen

    def check(self, config: PretrainedConfig) -> None:
        """Raises InputError for a model that cannot have these adapters; known before weights are loaded."""
        layout = layout_of(config)
        self.projections(layout)
        if self.adapts_head and config.tie_word_embeddings:
            raise InputError(
                f"model.lora.targets: the output layer of this {layout.model_type} is its embedding, which an adapter "
                "on lm_head would pull apart: leave lm_head out."
            )
        if self.base != "full" and layout.transposed:
            raise InputError(
                f"model.lora.base={self.base}: {layout.model_type} stores its projections the other way round than "
                "bitsandbytes unpacks them; use base: full."
            )

    @property
    def record(self) -> dict[str, object]:
        """What a checkpoint must have in common with the run that goes on from it, as plain data."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": self.targets, "base": self.base}


def lora_for(whats: Sequence[Trained], lora: Lora | None) -> Lora | None:
    """The adapters of a run in which these are trained one after the other; None where no adapters are.

    Raises:
        InputError: If adapters are described that nothing trains, or packed weights would have to be trained.
    """
    kinds = {trains_adapters(what) for what in whats}
    if lora is None:
        return Lora() if True in kinds else None
    settings = ", ".join(dict.fromkeys(whats))
    if True not in kinds:
        raise InputError(
            f"model.lora is given, but train={settings} trains no adapters: set model.train (or a phase's) to lora, "
            "or leave model.lora out."
        )
    if lora.base != "full" and False in kinds:
        raise InputError(
            f"model.lora.base={lora.base}: packed weights cannot be trained, which train={settings} asks for: use "
            "lora, lora_merged or lora_after_merge throughout, or base: full."
        )
    return lora


def attach(student: PreTrainedModel, lora: Lora) -> None:
    """Wraps the student's projections in place; as long as nothing is trained it computes what it did before."""
    quantized.quieten()
    from peft import LoraConfig, inject_adapter_in_model

    layout = layout_of(student.config)
    names = lora.projections(layout)
    depth = len(layout.layers_of(student))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=[
            *(f"{layout.layers}.{index}.{name}" for index in range(depth) for name in names),
            *([_name_of_head(student)] if lora.adapts_head else []),
        ],
        fan_in_fan_out=layout.transposed,
    )
    inject_adapter_in_model(config, student)
    for name, parameter in student.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def taken_apart(head: nn.Module) -> tuple[nn.Module, LowRank | None]:
    """An output layer without its adapter, and the adapter, if it has one; both share the layer's tensors."""
    factors = dict(head.named_parameters())
    down, up = (factors.get(f"lora_{factor}.{NAME}.weight") for factor in "AB")
    if down is None or up is None:
        return head, None
    layer = cast("LoraLayer", head)
    return layer.get_base_layer(), LowRank(down, up, layer.scaling[NAME])


def _name_of_head(student: PreTrainedModel) -> str:
    head = student.get_output_embeddings()
    return next(name for name, module in student.named_modules() if module is head)


@dataclass
class Changes:
    """What a block of `plain` has done to adapters; known when it has ended."""

    merged: list[nn.Parameter] = field(default_factory=list)
    """Of projections that were changed: the same Parameters, started afresh."""
    removed: list[nn.Parameter] = field(default_factory=list)
    """Of layers that are no longer in the model."""

    @property
    def outcome(self) -> Outcome:
        """The same in the form that an optimizer is told of merges in."""
        return Outcome(tuple(self.merged), tuple(self.removed))


@contextmanager
def plain(student: PreTrainedModel) -> Iterator[Changes]:
    """The student without adapters and packed weights, computing the same, for the length of the block.

    Example:
        >>> with plain(student) as changes:
        ...     surgery.apply(student, step)
        >>> optim.carry_over(optimizer, changes.outcome)
    """
    changes, stand_ins = Changes(), []
    try:
        for place in _places(student):
            stand_ins.append(_StandIn(*place))  # one by one: what fails has to be taken back
        yield changes
    finally:
        changed = [stand_in for stand_in in stand_ins if stand_in.leave()]
        alive = {id(module) for module in student.modules()}
        afresh = [stand_in for stand_in in changed if id(stand_in.original) in alive and stand_in.adapter is not None]
        _reset(student, [stand_in.adapter for stand_in in afresh if stand_in.adapter is not None])
        for stand_in in stand_ins:
            if id(stand_in.original) not in alive:
                changes.removed += _parameters(stand_in.original)
        for stand_in in afresh:
            changes.merged += _parameters(stand_in.original)


def fold(student: PreTrainedModel) -> None:
    """Makes the student a plain model for good: adapters become part of the weights, packed weights are unpacked."""
    for place in _places(student):
        _StandIn(*place)
    vars(student).pop("peft_config", None)
    quantized.forget(student)


def _places(student: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of every projection that is adapted or packed."""
    adapted = {name.partition(".lora_")[0] for name, _ in student.named_parameters() if is_adapter(name)}
    packed = {name.removesuffix(".base_layer") for name in quantized.packed_names(student)}
    places = []
    wanted = adapted | packed
    for path in [name for name, _ in student.named_modules() if name in wanted]:
        parent, _, name = path.rpartition(".")
        places.append((student.get_submodule(parent), name, student.get_submodule(path)))
    return places


class _StandIn:
    """The plain projection in the place of an adapted or packed one."""

    def __init__(self, parent: nn.Module, name: str, original: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        self._parent, self._name, self.original = parent, name, original
        self.adapter = original if isinstance(original, LoraLayer) else None
        base = original if self.adapter is None else self.adapter.get_base_layer()
        self._base = cast(nn.Linear, base)
        self._packed = quantized.is_packed(self._base)
        self._before = self._base.weight.data
        projection = quantized.unpacked(self._base) if self._packed else self._base
        if self.adapter is not None:
            projection.weight.data = _folded(projection.weight.data, self.adapter)
        self._projection, self._after = projection, projection.weight.data
        setattr(parent, name, projection)

    def leave(self) -> bool:
        """Puts the original back; whether the weights were changed, and so are now its own."""
        setattr(self._parent, self._name, self.original)
        now = self._projection.weight.data
        changed = now.data_ptr() != self._after.data_ptr()
        if self._packed and changed:
            quantized.repack(self._base, now)
        elif not self._packed and not changed:
            self._base.weight.data = self._before
        return changed


@torch.no_grad()
def _folded(weight: Tensor, adapter: "LoraLayer") -> Tensor:
    """W + alpha / rank * B A in new storage, added up in float32; W itself as long as B is 0."""
    down_RI, up_OR = (cast(nn.Linear, factors[NAME]).weight for factors in (adapter.lora_A, adapter.lora_B))
    if not bool(up_OR.any()):
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        exact = torch.promote_types(weight.dtype, torch.float32)
        delta_OI = up_OR.to(exact) @ down_RI.to(exact) * adapter.scaling[NAME]
        return (weight.to(exact) + (delta_OI.T if vars(adapter)["fan_in_fan_out"] else delta_OI)).to(weight.dtype)


def _reset(student: PreTrainedModel, adapters: list["LoraLayer"]) -> None:
    """New factors in the same Parameters: the same on every rank and after a resume, whatever its random state."""
    device = next(student.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(len(layout_of(student.config).layers_of(student)))
        for adapter in adapters:
            adapter.reset_lora_parameters(NAME, True)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in module.named_parameters() if is_adapter(f".{name}")]
