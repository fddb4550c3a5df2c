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
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lcprune.errors import InputError
from lcprune.merging import specs
from lcprune.merging.architectures import LayerLayout, layout_of
from lcprune.merging.calibration import Batch
from lcprune.merging.double import in_double, total
from lcprune.merging.lineage import Lineage, MergeHistory
from lcprune.merging.observation import observe, observe_attention
from lcprune.merging.progress import track
from lcprune.merging.projection import ProjectionFit
from lcprune.merging.regression import token_weights
from lcprune.merging.streams import Stream


class Refit(ABC):
    """Repairs a merged student without training. Subclasses are frozen dataclasses with a `refit` method."""

    def check(self, layout: LayerLayout) -> None:
        """Raises InputError for a family that this refit cannot serve."""

    def check_text(self, batches: Sequence[Batch]) -> None:
        """Raises InputError for calibration text that this refit can do nothing with."""

    @abstractmethod
    def refit(self, student: Stream, teacher: Stream, lineage: Lineage, merged: Sequence[int]) -> None:
        """Changes the student's weights in place; every changed Parameter gets new storage.

        Args:
            student: The merged model's stream at the embeddings; used up.
            teacher: The original model's, over the same batches; used up.
            lineage: Teacher layers of every student layer.
            merged: Student layers that the merges just made, in order.
        """


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
        listed = isinstance(self.strengths, list | tuple) and len(self.strengths) > 0
        if not listed or not all(_is_between(strength, 0, sys.float_info.max) for strength in self.strengths):
            wrong.append(f"strengths={self.strengths!r} must be a list of one or more numbers above 0")
        if not _is_between(self.held_out, 0, 1):
            wrong.append(f"held_out={self.held_out!r} must be a number between 0 and 1")
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
                "RidgeRefit has one calibration sequence and several strengths to choose from: give more "
                "(data.calibration_blocks of a TextDataModule), or one strength."
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
        fit = ProjectionFit(layer, branch, student, self.strengths, self.held_out)
        nearest = self._nearest(fit, student, teacher, layer, ancestors) if len(ancestors) > 1 else 0
        for index in range(len(student.states)):
            middle = _pass(teacher, ancestors, index)[nearest]
            written, reached = observe_attention(student, layer, index)
            fit.see(index, written, teacher.states[index] if middle is None else middle, reached)
        for ancestor in ancestors:
            teacher.leave(ancestor)
        if layout_of(student.model.config).mlp is not None:
            fit.solve()
            return
        # Experts read what the attention writes: what the sums foretell need not come to pass behind them.
        projection, before = layer.get_submodule(branch.consumer), _error_behind(student, teacher, layer)
        old = [parameter.data for parameter in projection.parameters()]
        fit.solve()
        if not _error_behind(student, teacher, layer) <= before:
            for parameter, values in zip(projection.parameters(), old, strict=True):
                parameter.data = values

    @staticmethod
    def _nearest(
        fit: ProjectionFit, student: Stream, teacher: Stream, layer: nn.Module, ancestors: Sequence[nn.Module]
    ) -> int:
        """Which ancestor's stream after attention the student's is nearest to; the first among equals.

        A pass of its own, after which the teacher stands where it stood: sums for every ancestor would be held at once.
        """
        errors, before = [0.0] * len(ancestors), list(teacher.states)
        for index in range(len(student.states)):
            middles = _pass(teacher, ancestors, index)
            if middles[0] is None:  # one target for all: the stream behind the last
                teacher.states[index] = before[index]
                return 0
            written, reached = observe_attention(student, layer, index)
            for number, middle in enumerate(middles):
                assert middle is not None
                errors[number] += fit.error(index, written, middle, reached)
            teacher.states[index] = before[index]
        return min(range(len(ancestors)), key=errors.__getitem__)

    @torch.no_grad()
    def refit_mlp(self, student: Stream, teacher: Stream, layer: nn.Module) -> None:
        """Towards the teacher's stream behind the last ancestor."""
        branch = layout_of(student.model.config).mlp
        assert branch is not None
        fit = ProjectionFit(layer, branch, student, self.strengths, self.held_out)
        for index, target in enumerate(teacher.states):
            seen = observe(student, layer, index)
            assert seen.mlp is not None
            fit.see(index, seen.mlp, target, seen.output_BTD)
        fit.solve()


def _is_between(value: object, low: float, high: float) -> bool:
    """Whether it is a number, which what comes from a plan need not be, and between these."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low < value < high


def _pass(teacher: Stream, ancestors: Sequence[nn.Module], index: int) -> list[Tensor | None]:
    """Moves a batch of the teacher through these layers; the stream between attention and MLP in each."""
    middles = []
    for ancestor in ancestors:
        seen = observe(teacher, ancestor, index)
        middles.append(seen.middle_BTD)
        teacher.states[index] = seen.output_BTD
    return middles


def _error_behind(student: Stream, teacher: Stream, layer: nn.Module) -> float:
    """Weighted squared distance of the student's stream behind a layer from where the teacher's is."""
    error = 0.0
    for index, (target, mask) in enumerate(zip(teacher.states, student.masks, strict=True)):
        e_BTD = target.float() - student.run(layer, index).float()
        error += total(token_weights(target, mask) * e_BTD.square().sum(-1))
    return error


def _same_weights(layer: nn.Module, *ancestors: nn.Module) -> bool:
    """Whether a student's layer is its one ancestor, tensor by tensor in the same storage."""
    pairs = zip(layer.parameters(), ancestors[0].parameters(), strict=True)
    return len(ancestors) == 1 and all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in pairs)


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
    return in_double(torch.cat(lengths)).mean().item()


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
    """The refit as plain data, for a plan; raises InputError as `specs.spec_of` does."""
    return specs.spec_of(Refit, refit)


def from_spec(spec: Mapping[str, object]) -> Refit:
    """The refit that `spec_of` described; raises InputError as `specs.from_spec` does."""
    return specs.from_spec(Refit, spec)


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
    with torch.no_grad():  # as operators merge: a user's own refit writes to Parameters that are trained
        from_spec(spec).refit(student, teacher, history.lineage, merged)
