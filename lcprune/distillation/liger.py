"""The output head and the loss by Liger's kernels (Triton; arXiv:2410.10989), on a GPU.

The same numbers as fused.py to the precision of the products, for a plain head and forward KL: softmax, divergence and
gradient of a token are one kernel over logits that stay in the products' dtype. Tokens go through in chunks here too,
because Liger wants the teacher's probabilities whole. Legend: `N` tokens, `C` tokens of a chunk, `D` hidden,
`V` vocabulary.
"""

import torch
from torch import Tensor

from lcprune.distillation.divergences import Divergence
from lcprune.distillation.fused import Full, Settings
from lcprune.distillation.head import Head

CHUNK = 2048
"""Tokens whose teacher probabilities exist at once; Liger cuts its own logits smaller."""


def reason_against(head: Head, divergence: Divergence | None) -> str | None:
    """Why Liger's kernels cannot compute this loss; None if they can.

    Args:
        head: The student's.
        divergence: That is asked for; None = cross-entropy alone.
    """
    if head.low_rank is not None:
        return "the head has an adapter"
    if head.bias_V is not None:
        return "the head has a bias"
    if head.cap is not None or head.scale != 1:
        return "the family scales or caps its logits"
    if divergence is not None and divergence.kind != "forward_kl":
        return f"{divergence.kind} is not among them"
    return None


def fused(
    student_ND: Tensor, student: Head, teacher: Full, targets_N: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum, divergence and cross-entropy, means over the N tokens; only the weighted sum has a gradient.

    As `lcprune.distillation.fused.fused`, for what `reason_against` says nothing against.
    """
    with torch.autocast(student_ND.device.type, enabled=False):
        return _LigerHead.apply(student_ND, student.weight_VD, teacher, targets_N, settings)


class _LigerHead(torch.autograd.Function):
    """Loss and gradient chunk by chunk; `backward` only scales what `forward` has computed."""

    @staticmethod
    def forward(ctx, student_ND, weight_VD, teacher, targets_N, settings):  # type: ignore[no-untyped-def]
        low_VD = weight_VD.detach().to(settings.dtype).requires_grad_(ctx.needs_input_grad[1])
        theirs_VD = teacher.head.weight_VD.detach().to(settings.dtype)
        grad_ND = torch.zeros_like(student_ND)
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if low_VD.requires_grad else None
        teach = torch.zeros((), device=student_ND.device)
        ce = torch.zeros_like(teach)
        for begin in range(0, len(targets_N), CHUNK):
            part = slice(begin, begin + CHUNK)
            states_CD = student_ND[part].detach().to(settings.dtype).requires_grad_()
            known_CD = teacher.states_ND[part].to(settings.dtype)
            with torch.enable_grad():
                terms = _terms(states_CD, low_VD, known_CD, theirs_VD, targets_N[part], settings)
                loss = settings.divergence_weight * terms[0] + settings.labels_weight * terms[1]
            wanted = [states_CD] if grad_VD is None else [states_CD, low_VD]
            found = torch.autograd.grad(loss, wanted)
            grad_ND[part] = found[0]
            if grad_VD is not None:
                grad_VD += found[1]
            teach += terms[0].detach()
            ce += terms[1].detach()
        divisor = float(max(len(targets_N), 1))
        # Only here, after the products: before, float16 would lose the small entries.
        ctx.save_for_backward(grad_ND.div_(divisor), None if grad_VD is None else grad_VD.div_(divisor))
        ctx.dtype = weight_VD.dtype
        teach, ce = teach / divisor, ce / divisor
        ctx.mark_non_differentiable(teach, ce)
        return settings.divergence_weight * teach + settings.labels_weight * ce, teach, ce

    @staticmethod
    def backward(ctx, grad_total, *_):  # type: ignore[no-untyped-def]
        grad_ND, grad_VD = ctx.saved_tensors
        scaled = None if grad_VD is None else grad_VD.mul_(grad_total).to(ctx.dtype)
        return grad_ND.mul_(grad_total.to(grad_ND.dtype)), scaled, None, None, None


def _terms(
    states_CD: Tensor, weight_VD: Tensor, known_CD: Tensor, theirs_VD: Tensor, targets_C: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Sums over a chunk of temperature**2 * KL and of cross-entropies, with gradients; 0 where one has no weight."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy, liger_fused_linear_kl_div

    teach = ce = torch.zeros((), device=states_CD.device)
    temperature = settings.divergence.temperature
    if settings.divergence_weight:
        with torch.no_grad():
            logits_CV = known_CD @ theirs_VD.t()
            p_CV = torch.softmax(logits_CV if temperature == 1 else logits_CV / temperature, -1, dtype=torch.float32)
            del logits_CV
        teach = temperature**2 * liger_fused_linear_kl_div(
            states_CD, weight_VD, p_CV, reduction="sum", temperature=temperature, accum_dtype=torch.float32
        )
    if settings.labels_weight:
        ce = liger_fused_linear_cross_entropy(
            states_CD, weight_VD, targets_C, reduction="sum", accum_dtype=torch.float32
        )
    return teach, ce
