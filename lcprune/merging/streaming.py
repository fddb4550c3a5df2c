"""Merging a model that does not fit into memory: its weights stay on disk and are read layer by layer.

    stored = StoredModel(config, folder, dtype=torch.float32)
    calibration = StreamedCalibration(stored.model, batches, stored=stored)      what planners ask
    student = student_of(stored, history, torch.bfloat16)                        structure and config, no weights
    for name, pieces in merged_tensors(stored, history): ...                     its weights, one layer at a time

All calibration batches stand before a layer, the layer is read, all batches go through it, the layer is forgotten. The
operators get members that read a tensor when they are asked for it, so a merge holds the layer that comes out and a
few tensors, however many members it has. Results equal those of the whole model bit for bit.

Memory: one layer, what one batch needs inside it, the state [B, T, D] of every batch, and the embeddings of tokens
that occur. Statistics over spans of several layers keep the earlier states in the temporary folder (TMPDIR).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, Calibration, LayerStats, SpanSums, mask_of, unmasked
from lcprune.merging.criteria import AngularDistance, BlockInfluence
from lcprune.merging.gradients import Magnitude
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import LayerTensors, Operator, from_spec
from lcprune.merging.planners import ContiguousBlock, FixedPlan, OneShotRanking, Planner
from lcprune.merging.progress import track
from lcprune.merging.shards import Shards
from lcprune.merging.streams import Stream

PLANNERS = (FixedPlan, OneShotRanking, ContiguousBlock)
"""Planners that ask only for statistics of one pass and for weights."""
CRITERIA = (BlockInfluence, AngularDistance, Magnitude)
"""Criteria that do."""

Member = int | tuple[MergeStep, tuple["Member", ...]]
"""Where a student's layer comes from: a layer of the original, or a merge of such."""


class NotByLayers(InputError):
    """The files hold a model otherwise than layer by layer."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(f"{reason}: {way_out}.")
        self.reason = reason


class StoredModel:
    """A causal LM whose weights stay in the safetensors files they are in."""

    def __init__(
        self, config: PretrainedConfig, folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """Reads the files' headers and compares them with the model that the config describes.

        Args:
            config: Of the model; not changed.
            folder: Where its safetensors files are.
            dtype: In which everything is computed, as `from_pretrained` takes it.
            device: Where a layer is brought to be run or merged.

        Raises:
            InputError: The files are not there, or do not hold this model's weights under its own names.
        """
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                f"The weights in {folder} are quantised, and layers can be read one by one only as plain numbers: "
                "choose the model as it was before quantisation."
            )
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.model = without_weights(config, dtype)
        """The structure; its weights are on the meta device, its buffers on `device`."""
        self.layout = layout_of(config)
        self.shards = Shards(folder)
        self._places = _places(self.model, self.shards)
        for name, buffer in list(self.model.named_buffers()):
            _put(self.model, name, buffer.to(self.device))

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layout.layers_of(self.model))

    def tensor(self, name: str) -> Tensor:
        """One parameter, in `dtype` and on `device`."""
        return self.shards.read(self._places[name]).to(self.device, self.dtype)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One parameter from front to back in flat pieces, in `dtype`."""
        return (piece.to(self.dtype) for piece in self.shards.pieces(self._places[name]))

    def layer(self, index: int) -> LayerTensors:
        """A layer's parameters by their names inside it; each is read whenever it is asked for."""
        prefix = f"{self.layout.layers}.{index}."
        names = [name.removeprefix(prefix) for name in self._places if name.startswith(prefix)]
        return _OnDemand(names, lambda name: self.tensor(prefix + name))

    def stats(self, batches: Sequence[Batch], spans: Sequence[int]) -> LayerStats:
        """What `calibration.collect` finds on the whole model, in one walk along the layers."""
        sums = SpanSums(spans, self.depth)
        masks = [mask_of(batch) for batch in batches]
        layers = self.layout.layers_of(self.model)
        with ExitStack() as stack:
            stack.enter_context(self._frame(batches))
            past = stack.enter_context(_past(max(spans)))
            stream: Stream | None = None
            for index, layer in enumerate(track(layers, "reading layers")):
                with _holding(layer, self.layer(index)):
                    if stream is None:  # which runs the first layer to see what it returns
                        stream = Stream(self.model, batches)
                        past.keep(0, stream.states)
                    for place, mask in enumerate(masks):
                        before_ND = unmasked(stream.states[place], mask).float()
                        stream.step(layer, place)
                        after_ND = unmasked(stream.states[place], mask).float()
                        for n in spans:
                            if n == 1:
                                sums.add(1, index, before_ND, after_ND)
                            elif index + 1 >= n:
                                earlier_ND = unmasked(past.state(index + 1 - n, place), mask).float()
                                sums.add(n, index + 1 - n, earlier_ND, after_ND)
                    past.keep(index + 1, stream.states)
        return sums.stats(batches, self.dtype)

    @contextmanager
    def _frame(self, batches: Sequence[Batch]) -> Iterator[None]:
        """What is around the layers, inside the block: of the embeddings only the rows of tokens that occur."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        assert isinstance(embedding, nn.Embedding)
        apart = {id(parameter) for module in (embedding, head) if module for parameter in module.parameters()}
        apart |= {id(parameter) for parameter in self.layout.layers_of(self.model).parameters()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        ids = torch.unique(torch.cat([batch["input_ids"].flatten() for batch in batches]).cpu())
        rows = self.shards.rows(self._places[names[id(embedding.weight)]], ids.tolist())
        ids, padding = ids.to(self.device), embedding.padding_idx
        embedding.padding_idx = None
        hook = embedding.register_forward_pre_hook(lambda _, args: (torch.searchsorted(ids, args[0]), *args[1:]))
        around = {name: self.tensor(name) for key, name in names.items() if key not in apart}
        around[names[id(embedding.weight)]] = rows.to(self.device, self.dtype)
        try:
            with _holding(self.model, around):
                yield
        finally:
            hook.remove()
            embedding.padding_idx = padding


@dataclass(frozen=True, kw_only=True)
class StreamedCalibration(Calibration):
    """A `Calibration` that answers planners from the files; `model` is `stored.model`, the structure alone."""

    stored: StoredModel
    """Where the weights are."""

    def layer_tensors(self, index: int) -> LayerTensors:
        """The parameters of one layer, read whenever they are asked for."""
        return self.stored.layer(index)

    def collect(self, spans: Sequence[int]) -> LayerStats:
        """One pass, layer by layer."""
        return self.stored.stats(self.batches, spans)


def check_planner(planner: Planner) -> None:
    """Raises InputError for a planner or criterion that needs the whole model in memory."""
    criterion = planner.criterion if isinstance(planner, OneShotRanking) else BlockInfluence()
    if type(planner) in PLANNERS and type(criterion) in CRITERIA:
        return
    what = f"criterion={criterion}" if type(planner) in PLANNERS else f"planner={planner}"
    planners, criteria = (", ".join(kind.__name__ for kind in kinds) for kinds in (PLANNERS, CRITERIA))
    raise InputError(
        f"collapse.{what} tries the whole model out, which a model read layer by layer cannot be: choose a planner "
        f"among {planners} with a criterion among {criteria}, or leave --stream out."
    )


def check_operator(operator: Operator) -> None:
    """Raises InputError for an operator that must see the merged model run."""
    if operator.needs_activity:
        raise InputError(
            f"operator {operator} chooses by what layers of the merged model do on text, which a model read layer by "
            "layer cannot show: choose another operator, or leave --stream out."
        )


def student_of(stored: StoredModel, history: MergeHistory, dtype: torch.dtype) -> PreTrainedModel:
    """The student that a plan leads to, config mended, without weights.

    Args:
        stored: The original.
        history: The plan.
        dtype: In which the student's weights will be stored.

    Raises:
        InputError: The plan does not fit the model, or holds a step that cannot be done layer by layer.
    """
    if history.teacher_depth != stored.depth:
        raise InputError(
            f"teacher_depth={history.teacher_depth} of the plan is not the model's, which is {stored.depth}."
        )
    student = without_weights(stored.config, dtype)
    for step in history.steps:
        if step.refit is not None:
            raise InputError(
                f"The plan refits the model after group {list(step.group)}, for which it must be in memory: take the "
                "refit out of the plan, or leave --stream out."
            )
        operator = from_spec(step.operator)
        check_operator(operator)
        operator.check(stored.layout)
    surgery.replay(student, history)
    return student


def merged_tensors(stored: StoredModel, history: MergeHistory) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """The student's parameters by name, each in one piece or several; a layer's come together, in order of depth."""
    prefix = stored.layout.layers
    for name in stored_tensors(stored.model):
        if not name.startswith(f"{prefix}."):
            yield name, stored.pieces(name)
    members: list[Member] = list(range(history.teacher_depth))
    for step in history.steps:
        members[step.group[0] : step.group[-1] + 1] = [(step, tuple(members[index] for index in step.group))]
    for index, member in enumerate(track(members, "merging and writing layers")):
        tensors = _merged(stored, member)
        for name in tensors:
            yield f"{prefix}.{index}.{name}", (tensors[name],)


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What `save_pretrained` writes of a model: its state without the second names of tied tensors."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), name)
    return {name: state[name] for name in names.values()}


def without_weights(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a config describes; what takes memory is on the meta device, buffers have their values."""
    with _EmptyOnMeta():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    return model.eval().requires_grad_(False)


class _EmptyOnMeta(TorchFunctionMode):
    """Inside the block `torch.empty`, with which modules make their weights, takes no memory."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


class _OnDemand(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for and kept by nobody."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Past:
    """States at earlier boundaries, in files."""

    def __init__(self, folder: Path | None, longest: int) -> None:
        self._folder, self._longest = folder, longest

    def keep(self, boundary: int, states: Sequence[Tensor]) -> None:
        """Keeps a boundary's states, and forgets those that no span reaches back to any more."""
        if self._folder is None:
            return
        for place, state in enumerate(states):
            torch.save(state, self._file(boundary, place))
            self._file(boundary - self._longest, place).unlink(missing_ok=True)

    def state(self, boundary: int, place: int) -> Tensor:
        """The state of batch `place` at a boundary."""
        state = torch.load(self._file(boundary, place), weights_only=True)
        assert isinstance(state, Tensor)
        return state

    def _file(self, boundary: int, place: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{boundary}-{place}.pt"


@contextmanager
def _past(longest: int) -> Iterator[_Past]:
    if longest == 1:  # the stream itself still stands there
        yield _Past(None, longest)
        return
    with TemporaryDirectory(prefix="lcprune-") as folder:
        yield _Past(Path(folder), longest)


def _merged(stored: StoredModel, member: Member) -> LayerTensors:
    if isinstance(member, int):
        return stored.layer(member)
    step, members = member
    operator = from_spec(step.operator)
    with torch.no_grad():
        return operator.merge([_merged(stored, each) for each in members], step.shares, stored.layout)


@contextmanager
def _holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A module with these tensors as its parameters, inside the block."""
    before = {name: parameter for name, parameter in module.named_parameters() if name in tensors}
    for name in tensors:
        _put(module, name, nn.Parameter(tensors[name], requires_grad=False))
    try:
        yield
    finally:
        for name, parameter in before.items():
            _put(module, name, parameter)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, tensor)


def _places(model: PreTrainedModel, shards: Shards) -> dict[str, str]:
    """The name in the files for every name of `stored_tensors`; checks what is there."""
    base = f"{model.base_model_prefix}."
    second = _second_names(model)
    places, missing, wrong = {}, [], []
    for name, tensor in stored_tensors(model).items():
        # Some are stored without the prefix of the causal LM; of tied tensors either name may be there.
        spellings = [each for full in (name, *second.get(name, ())) for each in (full, full.removeprefix(base))]
        found = [spelling for spelling in dict.fromkeys(spellings) if spelling in shards.entries]
        if not found:
            missing.append(name)
            continue
        places[name] = found[0]
        shards.dtype(found[0])
        wrong += [name] if shards.entries[found[0]].shape != tuple(tensor.shape) else []
        _check_tied(shards, found)
    if missing or wrong:
        problem = f"not under its name: {missing[0]}" if missing else f"of another shape: {wrong[0]}"
        raise NotByLayers(
            f"The files in {shards.folder} do not hold what transformers' {type(model).__name__} is made of, "
            f"{len(missing or wrong)} tensors are {problem}: a model whose weights are renamed or fused when they are "
            "loaded cannot be read layer by layer",
            "leave --stream out",
        )
    return places


def _second_names(model: PreTrainedModel) -> dict[str, list[str]]:
    first: dict[int, str] = {}
    second: dict[str, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            second.setdefault(first[id(tensor)], []).append(name)
    return second


def _check_tied(shards: Shards, names: Sequence[str]) -> None:
    for other in names[1:]:
        pairs = zip_longest(shards.pieces(names[0]), shards.pieces(other))
        if not all(left is not None and right is not None and torch.equal(left, right) for left, right in pairs):
            raise NotByLayers(
                f"The config in {shards.folder} ties {names[0]} and {other}, but the files hold different values for "
                "them",
                "set tie_word_embeddings to false in its config.json, or leave --stream out",
            )
