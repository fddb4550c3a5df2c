"""Closed-form repair after merging: output projections are fitted again so that the stream meets the teacher's.

    W = W0 + E Z^T (Z Z^T + lambda I)^-1        E = target - what the layer reaches with W0, Z = the projection's inputs

The student's layers are walked from front to back beside the teacher's. Z is what the *student* feeds the projection,
so that errors of earlier layers are absorbed; the target is the teacher's stream where the layer's ancestors end.
Shrinking is towards W0, never towards zero; lambda is chosen by held-out calibration sequences. (ReplaceMe,
arXiv:2505.02819, and LinearPatch, arXiv:2505.24680, fit a map of their own; here it goes into weights that are there.)

`MagnitudeCompensation` is the cheap fallback: one factor per merge (Prune&Comp, arXiv:2507.18212).

Legend: `B` batch, `T` tokens, `N` tokens of all sequences, `I` inputs of a projection, `D` hidden.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from lcprune.errors import InputError
from lcprune.merging.architectures import Branch, LayerLayout, layout_of
from lcprune.merging.calibration import Batch
from lcprune.merging.families import residual_scale
from lcprune.merging.lineage import Lineage, MergeHistory
from lcprune.merging.observation import Written, observe, observe_attention
from lcprune.merging.progress import track
from lcprune.merging.regression import Sums, best_strength, held_out_sequences, token_weights
from lcprune.merging.streams import Stream

SMALLEST_GAIN = 0.01
"""Where a norm follows a projection, outputs whose gain is below this fraction of the largest are left alone."""


class Refit:
    """Repairs a merged student without training. Subclasses are frozen dataclasses with a `refit` method."""

    def check(self, layout: LayerLayout) -> None:
        """Raises InputError for a family that this refit cannot serve."""

    def check_text(self, batches: Sequence[Batch]) -> None:
        """Raises InputError for calibration text that this refit can do nothing with."""

    def refit(self, student: Stream, teacher: Stream, lineage: Lineage, merged: Sequence[int]) -> None:
        """Changes the student's weights in place; every changed Parameter gets new storage.

        Args:
            student: The merged model's stream at the embeddings; used up.
            teacher: The original model's, over the same batches; used up.
            lineage: Teacher layers of every student layer.
            merged: Student layers that the merges just made, in order.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RidgeRefit(Refit):
    """Ridge regression of the attention's and then the MLP's output projection, layer by layer."""

    layers: Literal["merged", "after"] = "after"
    """Only merged layers, or every layer from the first merged one on."""
    projections: Literal["mlp", "both"] = "both"
    """Only the MLP's output projection, or before it the attention's too."""
    strengths: list[float] = field(default_factory=lambda: [0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
    """Candidates for lambda in units of the mean of diag(Z Z^T); each projection takes its best on held-out tokens."""
    held_out: float = 0.125
    """Fraction of the calibration sequences that chooses lambda; the projection is then fitted on all of them."""

    def __post_init__(self) -> None:
        wrong = []
        if self.layers not in ("merged", "after"):
            wrong.append(f"layers={self.layers!r} must be merged or after")
        if self.projections not in ("mlp", "both"):
            wrong.append(f"projections={self.projections!r} must be mlp or both")
        if not self.strengths or not min(self.strengths) > 0:
            wrong.append(f"strengths={self.strengths} must be one or more numbers above 0")
        if not 0 < self.held_out < 1:
            wrong.append(f"held_out={self.held_out} must lie between 0 and 1")
        if wrong:
            raise InputError(f"RidgeRefit: {'; '.join(wrong)}.")

    def check(self, layout: LayerLayout) -> None:
        """Layers of experts have no single MLP projection."""
        if layout.mlp is None and self.projections == "mlp":
            raise InputError(
                f"projections='mlp' of RidgeRefit: {layout.model_type} layers have experts and no single output "
                "projection; use projections: both, which refits the attention's alone there."
            )

    def check_text(self, batches: Sequence[Batch]) -> None:
        """Choosing a strength takes a sequence more than fitting with it."""
        if len(self.strengths) > 1 and sum(len(batch["input_ids"]) for batch in batches) < 2:
            raise InputError(
                "RidgeRefit has one calibration sequence and several strengths to choose from: raise "
                "data.calibration_blocks or give one strength."
            )

    @torch.no_grad()
    def refit(self, student: Stream, teacher: Stream, lineage: Lineage, merged: Sequence[int]) -> None:
        """Walks both models from front to back, see the first lines of this module."""
        layout = layout_of(student.model.config)
        layers, originals = layout.layers_of(student.model), layout.layers_of(teacher.model)
        chosen = set(merged) if self.layers == "merged" else set(range(min(merged), len(layers)))
        alike = all(map(torch.equal, student.states, teacher.states))
        for place in track(range(max(chosen) + 1), "refitting layers"):
            ancestors = [originals[index] for index in lineage[place]]
            alike = alike and place not in chosen and _same_weights(layers[place], *ancestors)
            if alike:
                student.advance(layers[place])
                teacher.states = list(student.states)
                teacher.leave(ancestors[0])
                continue
            if place in chosen:
                self.refit_layer(student, teacher, layers[place], ancestors)
            else:
                for ancestor in ancestors:
                    teacher.advance(ancestor)
            student.advance(layers[place])

    @torch.no_grad()
    def refit_layer(self, student: Stream, teacher: Stream, layer: nn.Module, ancestors: Sequence[nn.Module]) -> None:
        """Refits one layer; leaves the teacher behind its last ancestor and the student before the layer."""
        layout = layout_of(student.model.config)
        if self.projections == "both":
            self._refit_attention(student, teacher, layer, ancestors)
        else:
            for ancestor in ancestors:
                teacher.advance(ancestor)
        if layout.mlp is not None:
            self.refit_mlp(student, teacher, layer)

    def _refit_attention(
        self, student: Stream, teacher: Stream, layer: nn.Module, ancestors: Sequence[nn.Module]
    ) -> None:
        """Towards the ancestor whose stream after attention the student's is nearest to: of a `Drop`, the kept one.

        Where attention and MLP read the same stream, or experts follow, towards the stream behind the last ancestor;
        before experts the old weights stay unless the error behind the layer falls.
        """
        branch = layout_of(student.model.config).attention
        fits = [_Fit(self, layer, branch, student) for _ in ancestors]
        for index in range(len(student.states)):
            middles = []
            for ancestor in ancestors:
                seen = observe(teacher, ancestor, index)
                middles.append(seen.middle_BTD)
                teacher.states[index] = seen.output_BTD
            written, reached = observe_attention(student, layer, index)
            for fit, middle in zip(fits, middles, strict=True):
                fit.see(index, written, teacher.states[index] if middle is None else middle, reached)
        for ancestor in ancestors:
            teacher.leave(ancestor)
        best = min(fits, key=lambda fit: fit.energy)
        if layout_of(student.model.config).mlp is not None:
            best.solve()
            return
        # Experts read what the attention writes: what the sums foretell need not come to pass behind them.
        projection, before = layer.get_submodule(branch.consumer), _error_behind(student, teacher, layer)
        old = [parameter.data for parameter in projection.parameters()]
        best.solve()
        if not _error_behind(student, teacher, layer) <= before:
            for parameter, values in zip(projection.parameters(), old, strict=True):
                parameter.data = values

    @torch.no_grad()
    def refit_mlp(self, student: Stream, teacher: Stream, layer: nn.Module) -> None:
        """Towards the teacher's stream behind the last ancestor."""
        branch = layout_of(student.model.config).mlp
        assert branch is not None
        fit = _Fit(self, layer, branch, student)
        for index, target in enumerate(teacher.states):
            seen = observe(student, layer, index)
            assert seen.mlp is not None
            fit.see(index, seen.mlp, target, seen.output_BTD)
        fit.solve()


def _error_behind(student: Stream, teacher: Stream, layer: nn.Module) -> float:
    """Weighted squared distance of the student's stream behind a layer from where the teacher's is."""
    error = 0.0
    for index, (target, mask) in enumerate(zip(teacher.states, student.masks, strict=True)):
        e_BTD = target.float() - student.run(layer, index).float()
        error += float((token_weights(target, mask) * e_BTD.square().sum(-1)).sum(dtype=torch.float64))
    return error


def _same_weights(layer: nn.Module, *ancestors: nn.Module) -> bool:
    """Whether a student's layer is its one ancestor, tensor by tensor in the same storage."""
    pairs = zip(layer.parameters(), ancestors[0].parameters(), strict=True)
    return len(ancestors) == 1 and all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in pairs)


class _Fit:
    """The regression of one output projection, gathered batch by batch, then written into its weights."""

    def __init__(self, refit: RidgeRefit, layer: nn.Module, branch: Branch, student: Stream) -> None:
        layout = layout_of(student.model.config)
        self._refit, self._student, self._transposed = refit, student, layout.transposed
        self._scale = residual_scale(student.model.config)
        self._projection = layer.get_submodule(branch.consumer)
        self._gain_D: Tensor | None = None
        if branch.norm_after:
            norm = layer.get_submodule(branch.norm_after)
            assert isinstance(norm.weight, Tensor)
            self._gain_D = norm.weight.detach().float() + layout.norm_offset
        inputs = self._weight_DI.shape[1] + (self._bias is not None)
        shape = (inputs, self._weight_DI.shape[0], self._weight_DI.device)
        self._fitted, self._held_out = Sums.zeros(*shape), Sums.zeros(*shape)
        firsts = [0, *accumulate(len(state) for state in student.states)]
        self._firsts, held = firsts, held_out_sequences(firsts[-1], refit.held_out)
        self._held = held if len(refit.strengths) > 1 else set()

    @property
    def _weight_DI(self) -> Tensor:
        weight = self._projection.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if self._transposed else weight.detach()

    @property
    def _bias(self) -> Tensor | None:
        bias = self._projection.bias
        assert bias is None or isinstance(bias, Tensor)
        return None if bias is None else bias.detach()

    @property
    def energy(self) -> float:
        """The error as it stands."""
        return self._fitted.energy + self._held_out.energy

    def see(self, index: int, written: Written, target_BTD: Tensor, reached_BTD: Tensor) -> None:
        """Takes in batch `index`: what the projection was fed, where the stream should be, where it is."""
        z_BTI, e_BTD = written.inputs_BTI, (target_BTD.float() - reached_BTD.float()) / self._scale
        w_BT = token_weights(target_BTD, self._student.masks[index])
        if written.before_norm_BTD is not None and self._gain_D is not None:
            # Behind a norm: what the projection itself would have to add while the norm's divisor stays.
            divisor_BT1 = written.before_norm_BTD.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
            loud_D = self._gain_D.abs() > SMALLEST_GAIN * self._gain_D.abs().max()
            e_BTD = torch.where(loud_D, e_BTD * divisor_BT1 / self._gain_D, 0.0)
            w_BT = w_BT / divisor_BT1.squeeze(-1).square()
        if self._bias is not None:
            z_BTI = torch.cat([z_BTI, torch.ones_like(z_BTI[..., :1])], -1)
        held = torch.tensor([self._firsts[index] + place in self._held for place in range(len(z_BTI))])
        for sums, rows in ((self._fitted, ~held), (self._held_out, held)):
            if rows.any():
                rows = rows.to(z_BTI.device)
                sums.add(z_BTI[rows].flatten(0, 1), e_BTD[rows].flatten(0, 1), w_BT[rows].flatten())

    def solve(self) -> None:
        """Writes the better weights, unless the error would not fall, on all tokens or on the held-out ones."""
        strengths, everything = self._refit.strengths, self._fitted + self._held_out
        strength = strengths[0]
        if self._held:
            strength = best_strength(self._fitted, self._held_out, strengths)
            if self._held_out.error(self._fitted.solve(strength)) >= self._held_out.energy:
                return
        change_ID = everything.solve(strength)
        old_DI, bias_D = self._weight_DI, self._bias
        inputs = old_DI.shape[1]
        new_DI = (old_DI.double() + change_ID[:inputs].T).to(old_DI.dtype)
        change_ID[:inputs] = (new_DI.double() - old_DI.double()).T
        if bias_D is not None:
            new_D = (bias_D.double() + change_ID[-1]).to(bias_D.dtype)
            change_ID[-1] = new_D.double() - bias_D.double()
        # Rounded to the stored dtype, a small change may be none or even do harm.
        if everything.error(change_ID) >= everything.energy:
            return
        self._projection.weight.data = (new_DI.T if self._transposed else new_DI).contiguous()
        if bias_D is not None:
            self._projection.bias.data = new_D


@dataclass(frozen=True)
class MagnitudeCompensation(Refit):
    """One factor per merge: the stream gets the length it has in the teacher (Prune&Comp, arXiv:2507.18212).

    The factor is E|h_last| / E|h_student| behind the merged layer. Every layer reads the stream through a norm, so
    that a longer stream is the same as shorter contributions of the layers that follow: those are divided by the
    factor, and embeddings, which may be tied to the head, stay as they are. What an earlier merge's factor has done to
    a layer is seen from what it adds to the teacher's stream, against what the original adds there.
    """

    def check(self, layout: LayerLayout) -> None:
        """Layers that read the stream without a norm would notice its length."""
        if not layout.attention.norm or layout.mlp is None:
            raise InputError(
                f"MagnitudeCompensation: {layout.model_type} layers read the stream without a norm or have experts, "
                "so that contributions cannot be scaled; use RidgeRefit."
            )

    @torch.no_grad()
    def refit(self, student: Stream, teacher: Stream, lineage: Lineage, merged: Sequence[int]) -> None:
        """Scales output projections behind each merge."""
        layout = layout_of(student.model.config)
        layers, originals = layout.layers_of(student.model), layout.layers_of(teacher.model)
        factor: float | None = None
        shortened = 1.0  # by earlier merges: what follows adds so many times less than its original
        for place in track(range(len(layers)), "compensating magnitudes"):
            if factor is not None:
                if len(lineage[place]) == 1:
                    theirs = _mean_step(teacher, originals[lineage[place][0]], teacher.states)
                    ours = _mean_step(student, layers[place], teacher.states)
                    shortened = theirs / ours if theirs and ours else shortened  # an attention may add nothing
                _scale_contributions(layers[place], layout, shortened / factor)
            for index in lineage[place]:
                teacher.advance(originals[index])
            student.advance(layers[place])
            if place in merged:
                factor = _mean_length(teacher, teacher.states) / _mean_length(student, student.states)


def _mean_step(stream: Stream, layer: nn.Module, states: Sequence[Tensor]) -> float:
    """Mean length of what a layer's attention adds to these states, or both branches where they read the same one."""
    own, stream.states = stream.states, list(states)
    reached = [observe_attention(stream, layer, index)[1] for index in range(len(states))]
    stream.states = own
    return _mean_length(stream, [state - before for state, before in zip(reached, states, strict=True)])


def _mean_length(stream: Stream, states: Sequence[Tensor]) -> float:
    """E|h| over the tokens that count."""
    lengths = [
        (state if mask is None else state[mask]).float().norm(dim=-1).flatten()
        for state, mask in zip(states, stream.masks, strict=True)
    ]
    return float(torch.cat(lengths).double().mean())


def _scale_contributions(layer: nn.Module, layout: LayerLayout, factor: float) -> None:
    """Multiplies what a layer's branches write into the stream."""
    for branch in (layout.attention, layout.mlp):
        assert branch is not None
        if branch.norm_after:
            weight = layer.get_parameter(f"{branch.norm_after}.weight")
            weight.data = (weight.data + layout.norm_offset) * factor - layout.norm_offset
            continue
        for parameter in layer.get_submodule(branch.consumer).parameters():
            parameter.data = parameter.data * factor


def spec_of(refit: Refit) -> dict[str, object]:
    """The refit as plain data, for a plan: `{"class_path": ..., "init_args": {...}}`."""
    kind = type(refit)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": asdict(refit)}  # type: ignore[call-overload]


def from_spec(spec: Mapping[str, object]) -> Refit:
    """The refit that `spec_of` described; a bare class name means one of this module.

    Raises:
        InputError: If the class is not a refit, or not imported, or does not take the arguments.
    """
    class_path, init_args = str(spec.get("class_path")), spec.get("init_args") or {}
    module_name, _, name = class_path.rpartition(".")
    module = sys.modules.get(__name__ if module_name in ("", "lcprune") else module_name)
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Refit) and kind is not Refit):
        known = ", ".join(sorted(sub.__name__ for sub in Refit.__subclasses__()))
        raise InputError(f"refit class_path={class_path!r} is not a refit; known are {known}.")
    allowed = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    unknown = [key for key in (init_args if isinstance(init_args, Mapping) else ["init_args"]) if key not in allowed]
    if unknown:
        raise InputError(
            f"refit {name} does not take {unknown[0]!r}; its arguments are: {', '.join(allowed) or 'none'}."
        )
    refit = kind(**init_args)  # type: ignore[arg-type]
    assert isinstance(refit, Refit)
    return refit


def repair(student: Stream, teacher: Stream, history: MergeHistory, before: MergeHistory) -> None:
    """Runs the refit that the history's last step asks for, over what merged since `before`; nothing if it asks none.

    Args:
        student: The merged model's stream at the embeddings.
        teacher: The original model's.
        history: How the student came from the teacher.
        before: The same history as it was at the last refit, or before the first merge.
    """
    spec = history.steps[-1].refit
    if spec is None:
        return
    known = set(before.lineage)
    merged = [place for place, ancestors in enumerate(history.lineage) if ancestors not in known]
    from_spec(spec).refit(student, teacher, history.lineage, merged)
