"""The maths of distillation: functions of tensors, no model in sight.

    logits     KL(p_teacher || p_student), p = softmax(W h / temperature)    forward KL; Minitron, arXiv:2407.14679
    labels     cross-entropy of the next token
    boundary   1 - cos(h_s, h_t), or |h_s - h_t|^2 / |h_t|^2, per token

`head_loss` goes from last states to the loss without ever holding full logits: it walks over chunks of tokens and
takes the gradient of each chunk on the way, so that its memory does not grow with the number of tokens and nothing
is computed twice. Legend: `N` scored tokens, `C` tokens of a chunk, `D` hidden, `V` vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear, log_softmax

CHUNK = 512
"""Tokens whose logits exist at once."""


@dataclass(frozen=True)
class HeadLoss:
    """What `head_loss` returns."""

    total: Tensor
    """logits_weight * logits + labels_weight * labels, a scalar with a gradient."""
    logits: Tensor
    """Mean forward KL in nats per token, detached."""
    labels: Tensor
    """Mean cross-entropy in nats per token, detached; 0 where it has no weight."""


def head_loss(
    student_ND: Tensor,
    student_VD: Tensor,
    teacher_ND: Tensor,
    teacher_VD: Tensor,
    *,
    targets_N: Tensor,
    count: Tensor | float | None = None,
    logits_weight: float = 1.0,
    labels_weight: float = 0.0,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> HeadLoss:
    """Forward KL to the teacher's next-token distribution, and cross-entropy, from last states and head weights.

    Args:
        student_ND: Student states at the scored positions, after the final norm.
        student_VD: Student head weight.
        teacher_ND: Teacher states at the same positions; gets no gradient.
        teacher_VD: Teacher head weight; gets no gradient.
        targets_N: Next token at every position.
        count: By how many tokens to divide (default N); for batches that are parts of a whole.
        logits_weight: Weight of the KL term, which is multiplied by temperature**2 (Hinton, arXiv:1503.02531).
        labels_weight: Weight of the cross-entropy (at temperature 1).
        temperature: Softens both distributions of the KL term.
        chunk: C; memory is proportional to C * V.

    With N = 0 every term is 0 and the gradient is 0, not missing.
    """
    divisor = torch.as_tensor(max(len(targets_N), 1) if count is None else count, dtype=torch.float32)
    total, logits, labels = _ChunkedHead.apply(
        student_ND,
        student_VD,
        teacher_ND.detach(),
        teacher_VD.detach(),
        targets_N,
        _Settings(divisor.item(), logits_weight, labels_weight, temperature, chunk),
    )
    return HeadLoss(total, logits.detach(), labels.detach())


@dataclass(frozen=True)
class _Settings:
    divisor: float
    logits_weight: float
    labels_weight: float
    temperature: float
    chunk: int


class _ChunkedHead(torch.autograd.Function):
    """Loss and gradient chunk by chunk; `backward` only scales what `forward` has computed."""

    @staticmethod
    def forward(ctx, student_ND, student_VD, teacher_ND, teacher_VD, targets_N, settings):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        needs_states, needs_head = ctx.needs_input_grad[:2]
        grad_states = torch.zeros_like(student_ND) if needs_states else None
        grad_head = torch.zeros(student_VD.shape, dtype=torch.float32, device=student_VD.device) if needs_head else None
        kl = torch.zeros((), dtype=torch.float32, device=student_ND.device)
        ce = torch.zeros_like(kl)
        # One matmul dtype for head and states: that of the states, which autocast has set.
        head_s, head_t = student_VD.to(student_ND.dtype), teacher_VD.to(teacher_ND.dtype)
        for begin in range(0, len(targets_N), settings.chunk):
            part = slice(begin, begin + settings.chunk)
            logits_CV = linear(student_ND[part], head_s).float()
            grad_CV = torch.zeros_like(logits_CV)
            if settings.labels_weight:
                ce += _add_cross_entropy(logits_CV, targets_N[part], settings.labels_weight, grad_CV)
            if settings.logits_weight:
                teacher_CV = linear(teacher_ND[part], head_t).float()
                kl += _add_forward_kl(logits_CV, teacher_CV, settings, grad_CV)
                del teacher_CV
            del logits_CV
            grad_CV = grad_CV.div_(settings.divisor).to(student_ND.dtype)
            if grad_states is not None:
                grad_states[part] = grad_CV @ head_s
            if grad_head is not None:
                grad_head += (grad_CV.t() @ student_ND[part]).float()
        ctx.save_for_backward(grad_states, grad_head)
        ctx.head_dtype = student_VD.dtype
        kl, ce = kl / settings.divisor, ce / settings.divisor
        ctx.mark_non_differentiable(kl, ce)
        return settings.logits_weight * kl + settings.labels_weight * ce, kl, ce

    @staticmethod
    def backward(ctx, grad_total, *_):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN205
        grad_states, grad_head = ctx.saved_tensors
        states = None if grad_states is None else (grad_states * grad_total).to(grad_states.dtype)
        head = None if grad_head is None else (grad_head * grad_total).to(ctx.head_dtype)
        return states, head, None, None, None, None


def _add_cross_entropy(logits_CV: Tensor, targets_C: Tensor, weight: float, grad_CV: Tensor) -> Tensor:
    """Sum of cross-entropies; adds weight * (softmax - onehot) to the gradient."""
    log_p = log_softmax(logits_CV, dim=-1)
    at_target = targets_C[:, None]
    total = -log_p.gather(1, at_target).sum()
    grad_CV += log_p.exp_().mul_(weight)
    grad_CV.scatter_add_(1, at_target, torch.full_like(at_target, -weight, dtype=grad_CV.dtype))
    return total


def _add_forward_kl(logits_CV: Tensor, teacher_CV: Tensor, settings: _Settings, grad_CV: Tensor) -> Tensor:
    """Sum of temperature**2 * KL(teacher || student); adds weight * temperature * (p_s - p_t) to the gradient."""
    log_s = log_softmax(logits_CV / settings.temperature, dim=-1)
    log_t = log_softmax(teacher_CV / settings.temperature, dim=-1)
    p_t = log_t.exp()
    # Summed per token before it is rounded up to 0: rounding alone can make a tiny KL negative.
    total = (p_t * log_t.sub_(log_s)).sum(-1).clamp_(min=0).sum() * settings.temperature**2
    grad_CV += log_s.exp_().sub_(p_t).mul_(settings.logits_weight * settings.temperature)
    return total


def boundary_loss(
    student_ND: Tensor, teacher_ND: Tensor, *, kind: Literal["cosine", "mse"], count: Tensor | float | None = None
) -> Tensor:
    """Distance between the student's and the teacher's residual stream, averaged over tokens; a scalar.

    `cosine` is 1 - cos(h_s, h_t); `mse` is |h_s - h_t|^2 / |h_t|^2, normalised token by token, because the first
    tokens of a sequence carry activations that are orders of magnitude larger than all others.

    Args:
        student_ND: Student states.
        teacher_ND: Teacher states; get no gradient.
        kind: Which distance.
        count: By how many tokens to divide (default N).
    """
    student, teacher = student_ND.float(), teacher_ND.detach().float()
    if kind == "cosine":
        loss_N = 1 - cosine_similarity(student, teacher, dim=-1)
    else:
        loss_N = (student - teacher).pow(2).sum(-1) / teacher.pow(2).sum(-1).clamp(min=1e-12)
    return loss_N.sum() / (max(len(loss_N), 1) if count is None else count)
