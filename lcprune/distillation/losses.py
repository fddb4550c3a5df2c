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
from torch.nn.functional import cosine_similarity

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
        logits_weight: Weight of the KL term, which is multiplied by temperature**2 (Hinton, arXiv:1503.02531).
        labels_weight: Weight of the cross-entropy (at temperature 1).
        temperature: Softens both distributions of the KL term.
        chunk: C; memory is proportional to C * V.

    With N = 0 every term is 0 and the gradient is 0, not missing.
    """
    device = student_ND.device.type
    autocast = torch.is_autocast_enabled(device)
    settings = _Settings(
        divisor=float(max(len(targets_N), 1)),
        logits_weight=logits_weight,
        labels_weight=labels_weight,
        temperature=temperature,
        chunk=chunk,
        compute=torch.get_autocast_dtype(device) if autocast else student_ND.dtype,
    )
    with torch.autocast(device, enabled=False):
        total, logits, labels = _ChunkedHead.apply(
            student_ND, student_VD, teacher_ND.detach(), teacher_VD.detach(), targets_N, settings
        )
    return HeadLoss(total, logits.detach(), labels.detach())


@dataclass(frozen=True)
class _Settings:
    divisor: float
    logits_weight: float
    labels_weight: float
    temperature: float
    chunk: int
    compute: torch.dtype


class _ChunkedHead(torch.autograd.Function):
    """Loss and gradient chunk by chunk; `backward` only scales what `forward` has computed."""

    @staticmethod
    def forward(ctx, student_ND, student_VD, teacher_ND, teacher_VD, targets_N, settings):  # type: ignore[no-untyped-def]
        needs_states, needs_head = ctx.needs_input_grad[:2]
        grad_states = torch.zeros_like(student_ND) if needs_states else None
        grad_head = None
        kl = torch.zeros((), dtype=torch.float32, device=student_ND.device)
        ce = torch.zeros_like(kl)
        head_s = student_VD.to(settings.compute)
        head_t = teacher_VD.to(settings.compute)
        scratch = _Scratch(min(settings.chunk, max(len(targets_N), 1)), student_VD, settings.compute)
        for begin in range(0, len(targets_N), settings.chunk):
            part = slice(begin, begin + settings.chunk)
            states_CD = student_ND[part].to(settings.compute)
            logits_CV = scratch.matmul(0, states_CD, head_s)
            if settings.logits_weight:
                teacher_CV = scratch.matmul(1, teacher_ND[part].to(settings.compute), head_t)
                chunk_kl, chunk_ce, grad_CV = _both(logits_CV, teacher_CV, targets_N[part], settings, scratch)
                kl += chunk_kl
            else:
                chunk_ce, grad_CV = _cross_entropy(logits_CV, targets_N[part], settings.labels_weight, scratch)
            ce += chunk_ce
            # Divided by the number of tokens only after the products: before, float16 would lose the small entries.
            grad_CV = grad_CV.to(settings.compute)
            if grad_states is not None:
                grad_states[part] = (grad_CV @ head_s).div_(settings.divisor)
            if needs_head:
                product = (grad_CV.t() @ states_CD).to(torch.float32)
                grad_head = product if grad_head is None else grad_head.add_(product)
        if needs_head and grad_head is None:
            grad_head = torch.zeros_like(student_VD, dtype=torch.float32)
        if grad_head is not None:
            grad_head /= settings.divisor
        ctx.save_for_backward(grad_states, grad_head)
        ctx.head_dtype = student_VD.dtype
        kl, ce = kl / settings.divisor, ce / settings.divisor
        ctx.mark_non_differentiable(kl, ce)
        return settings.logits_weight * kl + settings.labels_weight * ce, kl, ce

    @staticmethod
    def backward(ctx, grad_total, *_):  # type: ignore[no-untyped-def]
        grad_states, grad_head = ctx.saved_tensors
        # In place: nobody else holds them, and another [V, D] would cost more than the multiplication.
        states = None if grad_states is None else grad_states.mul_(grad_total.to(grad_states.dtype))
        head = None if grad_head is None else grad_head.mul_(grad_total).to(ctx.head_dtype)
        return states, head, None, None, None, None


class _Scratch:
    """Four float32 buffers [C, V] that every chunk uses again.

    On CPUs fresh pages for every temporary cost more than the arithmetic on them.
    """

    def __init__(self, chunk: int, head_VD: Tensor, compute: torch.dtype) -> None:
        shape = (chunk, len(head_VD))
        self._buffers = [torch.empty(shape, dtype=torch.float32, device=head_VD.device) for _ in range(4)]
        low = compute != torch.float32
        self._product = torch.empty(shape, dtype=compute, device=head_VD.device) if low else None

    def empty(self, index: int, rows: int) -> Tensor:
        """The first rows of a buffer, with whatever they hold."""
        return self._buffers[index][:rows]

    def matmul(self, index: int, states_CD: Tensor, head_VD: Tensor) -> Tensor:
        """Logits [C, V] in float32, multiplied in the dtype of the states."""
        rows = len(states_CD)
        if self._product is None:
            return torch.mm(states_CD, head_VD.t(), out=self.empty(index, rows))
        torch.mm(states_CD, head_VD.t(), out=self._product[:rows])
        return self.empty(index, rows).copy_(self._product[:rows])


def _both(
    logits_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor, settings: _Settings, scratch: _Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of temperature**2 * KL(teacher || student) and of cross-entropies, and the gradient of the weighted sum.

    d/dz of temperature**2 * KL is temperature * (p_student - p_teacher). Buffers 0 and 1, the logits, are used up.
    """
    temperature, weight = settings.temperature, settings.logits_weight * settings.temperature
    ce = torch.zeros((), device=logits_CV.device)
    if settings.labels_weight and temperature != 1:
        # Another softmax, at temperature 1; the buffers are free again when its gradient has been copied.
        ce, hard_CV = _cross_entropy(logits_CV, targets_C, settings.labels_weight, scratch)
        hard_CV = hard_CV.clone()
    if temperature != 1:
        logits_CV /= temperature
        teacher_CV /= temperature
    log_s = torch.log_softmax(logits_CV, -1, out=scratch.empty(2, len(logits_CV)))
    log_t = torch.log_softmax(teacher_CV, -1, out=scratch.empty(3, len(logits_CV)))
    grad_CV = torch.exp(log_s, out=logits_CV)
    p_t = torch.exp(log_t, out=teacher_CV)
    if settings.labels_weight and temperature == 1:
        grad_CV *= weight + settings.labels_weight
        ce = _at_targets(log_s, grad_CV, targets_C, settings.labels_weight)
    elif weight != 1:
        grad_CV *= weight
    grad_CV.sub_(p_t, alpha=weight)
    if settings.labels_weight and temperature != 1:
        grad_CV += hard_CV
    # Rounded up to 0 token by token: at equality rounding alone can make a tiny KL negative.
    kl = _dot(p_t, log_t.sub_(log_s)).clamp_(min=0).sum() * temperature**2
    return kl, ce, grad_CV


def _cross_entropy(logits_CV: Tensor, targets_C: Tensor, weight: float, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies and weight * (softmax - onehot), in buffers 2 and 3; the logits stay."""
    log_p = torch.log_softmax(logits_CV, -1, out=scratch.empty(2, len(logits_CV)))
    grad_CV = torch.exp(log_p, out=scratch.empty(3, len(logits_CV))).mul_(weight)
    return _at_targets(log_p, grad_CV, targets_C, weight), grad_CV


def _at_targets(log_p_CV: Tensor, grad_CV: Tensor, targets_C: Tensor, weight: float) -> Tensor:
    """Sum of -log p(target); takes `weight` off the gradient at the targets."""
    at = targets_C[:, None]
    grad_CV.scatter_add_(1, at, torch.full_like(at, -weight, dtype=grad_CV.dtype))
    return -log_p_CV.gather(1, at).sum()


def _dot(left_CV: Tensor, right_CV: Tensor) -> Tensor:
    """Sum over V of the products, per row, without a temporary."""
    return torch.bmm(left_CV[:, None], right_CV[:, :, None]).flatten()


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
