"""The maths of distillation: functions of tensors, no model in sight.

    logits     a divergence of the next-token distributions, forward KL by default    Minitron, arXiv:2407.14679
    labels     cross-entropy of the next token
    boundary   1 - cos(h_s, h_t), or |h_s - h_t|^2 / |h_t|^2, per token

`head_loss` goes from last states to the loss without ever holding full logits (fused.py); divergences.py has the
formulas. Legend: `N` scored tokens, `C` tokens of a chunk, `D` hidden, `V` vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lcprune.distillation.buckets import Buckets
from lcprune.distillation.divergences import Divergence
from lcprune.distillation.fused import Full, Settings, fused
from lcprune.distillation.head import Head


@dataclass(frozen=True)
class HeadLoss:
    """What `head_loss` returns: means over tokens, and over how many.

    Means of micro-batches, each weighted by its `tokens`, add up to the mean of the whole.
    """

    total: Tensor
    """logits_weight * logits + labels_weight * labels, a scalar with a gradient."""
    logits: Tensor
    """Mean divergence in nats per token, times temperature**2, detached; 0 where it has no weight."""
    labels: Tensor
    """Mean cross-entropy in nats per token, detached; 0 where it has no weight."""
    tokens: int
    """N, what the means are over; 0 = every term is 0 and its gradient too."""


def head_loss(
    student_ND: Tensor,
    student: Head,
    teacher_ND: Tensor,
    teacher: Head,
    *,
    targets_N: Tensor,
    divergence: Divergence | None = None,
    logits_weight: float = 1.0,
    labels_weight: float = 0.0,
    chunk: int | None = None,
) -> HeadLoss:
    """Divergence from the teacher's next-token distribution, and cross-entropy, from last states and heads.

    Args:
        student_ND: Student states at the scored positions, after the final norm.
        student: Student head; whichever of its tensors want a gradient get one.
        teacher_ND: Teacher states at the same positions; gets no gradient.
        teacher: Teacher head; gets no gradient.
        targets_N: Next token at every position.
        divergence: Which one, at which temperature; default: forward KL at 1.
        logits_weight: Weight of the divergence.
        labels_weight: Weight of the cross-entropy (at temperature 1).
        chunk: C; memory is proportional to C * V; default: fused.CHUNK, or by rows.py fused.ROWS_CHUNK.

    With N = 0 every term is 0 and the gradient is 0, not missing.
    """
    formula = Divergence() if divergence is None else divergence
    settings = Settings(formula, logits_weight, labels_weight, chunk, _dtype(student_ND))
    return _loss(student_ND, student, Full(teacher_ND.detach(), teacher), targets_N, settings)


def bucket_loss(
    student_ND: Tensor,
    student: Head,
    teacher: Buckets,
    *,
    targets_N: Tensor,
    logits_weight: float = 1.0,
    labels_weight: float = 0.0,
    chunk: int | None = None,
) -> HeadLoss:
    """`head_loss` by forward KL from a teacher of whom only the likeliest tokens are known (buckets.py).

    Args:
        student_ND: Student states at the scored positions, after the final norm.
        student: Student head; whichever of its tensors want a gradient get one.
        teacher: What is known of the teacher's distribution at the same positions.
        targets_N: Next token at every position.
        logits_weight: Weight of the divergence.
        labels_weight: Weight of the cross-entropy.
        chunk: C; memory is proportional to C * V; default: fused.CHUNK.
    """
    settings = Settings(Divergence(), logits_weight, labels_weight, chunk, _dtype(student_ND))
    return _loss(student_ND, student, teacher, targets_N, settings)


def _loss(
    student_ND: Tensor, student: Head, teacher: Full | Buckets, targets_N: Tensor, settings: Settings
) -> HeadLoss:
    total, logits, labels = fused(student_ND, student, teacher, targets_N, settings)
    return HeadLoss(total, logits.detach(), labels.detach(), len(targets_N))


def _dtype(states: Tensor) -> torch.dtype:
    """What matrix products are computed in."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def boundary_loss(student_ND: Tensor, teacher_ND: Tensor, *, kind: Literal["cosine", "mse"]) -> Tensor:
    """Distance between the student's and the teacher's residual stream, averaged over tokens; a scalar.

    `cosine` is 1 - cos(h_s, h_t); `mse` is |h_s - h_t|^2 / |h_t|^2, normalised token by token, because the first
    tokens of a sequence carry activations that are orders of magnitude larger than all others.

    Args:
        student_ND: Student states.
        teacher_ND: Teacher states; get no gradient.
        kind: Which distance.
    """
    student, teacher = student_ND.float(), teacher_ND.detach().float()
    if kind == "cosine":
        loss_N = 1 - cosine_similarity(student, teacher, dim=-1)
    else:
        loss_N = (student - teacher).pow(2).sum(-1) / teacher.pow(2).sum(-1).clamp(min=1e-12)
    return loss_N.sum() / max(len(loss_N), 1)
