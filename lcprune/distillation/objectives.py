"""What is optimized: a sum of levels, each taught by the teacher through the lineage.

    Logits      the teacher's next-token distribution (forward KL)
    Boundary    the teacher's residual stream where the student layer's last ancestor ended: h_last(s)
    Labels      the text itself (cross-entropy), for the user's own data

A level is data; it declares what it needs, and only that is computed. Only positions whose next token is scored
(label not -100) count. Legend: `B` batch, `T` tokens, `N` scored positions, `D` hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lcprune.distillation.losses import boundary_loss, head_loss
from lcprune.distillation.teacher import States
from lcprune.errors import InputError
from lcprune.merging.calibration import Batch
from lcprune.merging.lineage import Lineage

LevelT = TypeVar("LevelT", bound="Level")


class Level:
    """One term of the objective. Subclasses are frozen dataclasses with a `weight`."""

    weight: float


@dataclass(frozen=True)
class Logits(Level):
    """Forward KL from the teacher's next-token distribution to the student's."""

    weight: float = 1.0
    """Factor of this term."""
    temperature: float = 1.0
    """Softens both distributions; 1 is best supported for depth-pruned students (Minitron, arXiv:2407.14679)."""

    def __post_init__(self) -> None:
        _check_weight(self)
        if self.temperature <= 0:
            raise InputError(f"temperature={self.temperature} of Logits must be positive.")


@dataclass(frozen=True)
class Boundary(Level):
    """Distance of a student layer's output to the teacher's where its last ancestor ended (after CoMe, 2510.15304)."""

    weight: float = 1.0
    """Factor of this term, which is averaged over layers and tokens."""
    distance: Literal["cosine", "mse"] = "cosine"
    """1 - cosine, or squared error relative to the teacher's squared norm, token by token."""
    layers: Literal["merged", "all"] = "merged"
    """Which student layers are taught: those that were merged, or every one."""

    def __post_init__(self) -> None:
        _check_weight(self)
        if self.distance not in ("cosine", "mse") or self.layers not in ("merged", "all"):
            raise InputError(
                f"Boundary: distance={self.distance!r} must be cosine or mse, layers={self.layers!r} merged or all."
            )


@dataclass(frozen=True)
class Labels(Level):
    """Cross-entropy of the next token of the text."""

    weight: float = 1.0
    """Factor of this term."""

    def __post_init__(self) -> None:
        _check_weight(self)


def _check_weight(level: Level) -> None:
    if not level.weight > 0:
        raise InputError(
            f"weight={level.weight} of {type(level).__name__} must be positive: leave the level out instead."
        )


def check(levels: Sequence[Level]) -> None:
    """Raises InputError unless there is at least one level and none twice."""
    names = [type(level).__name__ for level in levels]
    if not names or len(names) != len(set(names)):
        raise InputError(f"objective={names} must name at least one of Logits, Boundary, Labels, and none twice.")


@dataclass(frozen=True)
class Forward:
    """A student's and a teacher's pass over the same batch."""

    batch: Batch
    """`input_ids` and `labels` [B, T]."""
    student: States
    """The student's states, with gradients."""
    student_head: Tensor
    """[V, D]."""
    teacher: States
    """The teacher's states, by teacher layer."""
    teacher_head: Tensor
    """[V, D]."""


def taught_layers(levels: Sequence[Level], lineage: Lineage) -> tuple[int, ...]:
    """Student layers whose outputs the levels look at; teacher layer `lineage[s][-1]` teaches layer s."""
    boundary = _only(levels, Boundary)
    if boundary is None:
        return ()
    return tuple(s for s, ancestors in enumerate(lineage) if boundary.layers == "all" or len(ancestors) > 1)


def objective(levels: Sequence[Level], forward: Forward, lineage: Lineage) -> dict[str, Tensor]:
    """The terms by metric name, unweighted and detached, and their weighted sum as `loss` with a gradient."""
    keep_BT = scored_positions(forward.batch)
    student_ND, teacher_ND = forward.student.last[keep_BT], forward.teacher.last[keep_BT]
    logits, labels = _only(levels, Logits), _only(levels, Labels)
    terms: dict[str, Tensor] = {}
    loss = torch.zeros((), device=student_ND.device)
    if logits is not None or labels is not None:
        head = head_loss(
            student_ND,
            forward.student_head,
            teacher_ND,
            forward.teacher_head,
            targets_N=next_tokens(forward.batch)[keep_BT],
            logits_weight=0.0 if logits is None else logits.weight,
            labels_weight=0.0 if labels is None else labels.weight,
            temperature=1.0 if logits is None else logits.temperature,
        )
        loss = loss + head.total
        terms |= {"logits": head.logits} if logits is not None else {}
        terms |= {"labels": head.labels} if labels is not None else {}
    boundary, layers = _only(levels, Boundary), taught_layers(levels, lineage)
    if boundary is not None and layers:
        distances = [
            boundary_loss(
                forward.student.layers[s][keep_BT],
                forward.teacher.layers[lineage[s][-1]][keep_BT],
                kind=boundary.distance,
            )
            for s in layers
        ]
        mean = torch.stack(distances).mean()
        loss = loss + boundary.weight * mean
        terms["boundary"] = mean.detach()
    if not terms:  # Boundary alone before the first merge: nothing to learn yet, but the step has to be possible
        loss = loss + 0 * student_ND.float().sum()
    return {"loss": loss, **terms}


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Labels [B, T] moved by one: entry t is what position t has to predict; -100 at the end."""
    labels_BT = batch.get("labels", batch["input_ids"])
    return torch.cat([labels_BT[:, 1:], torch.full_like(labels_BT[:, :1], -100)], dim=1)


def scored_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Which positions [B, T] have a next token that counts."""
    return next_tokens(batch) != -100


def _only(levels: Sequence[Level], kind: type[LevelT]) -> LevelT | None:
    return next((level for level in levels if isinstance(level, kind)), None)
