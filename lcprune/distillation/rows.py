"""Divergences and their gradients on a GPU: one kernel per token, and nothing of a vocabulary's size beside the logits.

The formulas are those of divergences.py, the sums in float32 whatever the logits are in. A kernel reads a token's two
rows of logits once for their normalisers and once for the rest (twice where a gradient needs a mean first), and writes
the gradient over the student's. Legend: `C` tokens of a chunk, `V` vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcprune.distillation.divergences import Divergence, Weights

BLOCK = 4096
"""Entries of a row that are worked on at once."""
WARPS = 8
"""Of 32 threads each, that share them."""


def value_and_gradient(
    logits_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor, divergence: Divergence, weights: Weights
) -> tuple[Tensor, Tensor]:
    """Every token's divergence [C] and cross-entropy [C]; the gradient of their weighted sum replaces the logits.

    Logits that are no numbers give NaN. As in divergences.py, the value does not know the factor temperature**2, nor
    the gradient dy/dz = 1 / temperature. The gradient holds all of the cross-entropy's, meant for temperature 1.

    Args:
        logits_CV: The student's, contiguous rows; overwritten.
        teacher_CV: The teacher's, likewise.
        targets_C: Next tokens; the cross-entropy of one outside of the vocabulary is NaN.
        divergence: Which one; its temperature divides the logits.
        weights: Factors of the divergence and of the cross-entropy.
    """
    assert logits_CV.stride(1) == teacher_CV.stride(1) == 1
    value_C, nats_C = torch.empty((2, len(logits_CV)), dtype=torch.float32, device=logits_CV.device)
    with torch.cuda.device_of(logits_CV):  # Triton launches on the current device
        _row[(len(logits_CV),)](
            logits_CV,
            teacher_CV,
            targets_C.contiguous(),
            value_C,
            nats_C,
            logits_CV.stride(0),
            teacher_CV.stride(0),
            logits_CV.shape[1],
            1 / divergence.temperature,
            divergence.share,
            weights.divergence,
            weights.softmax,
            KIND=divergence.kind,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return value_C, nats_C


@triton.jit
def _normaliser(logits, size, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Log of the sum of exp(scale * z) over a row."""
    top_B = tl.full((BLOCK,), float("-inf"), tl.float32)
    sum_B = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, size, BLOCK):
        place_B = begin + tl.arange(0, BLOCK)
        z_B = tl.load(logits + place_B, mask=place_B < size, other=float("-inf")).to(tl.float32) * scale
        higher_B = tl.maximum(top_B, z_B)
        # A lane that has seen nothing yet has no maximum to subtract.
        base_B = tl.where(higher_B == float("-inf"), 0.0, higher_B)
        sum_B = sum_B * tl.exp(top_B - base_B) + tl.exp(z_B - base_B)
        top_B = higher_B
    top = tl.max(top_B, 0)
    return top + tl.log(tl.sum(sum_B * tl.exp(top_B - top), 0))


@triton.jit
def _probabilities(logits, place_B, size, scale, norm):  # type: ignore[no-untyped-def]
    """Log-probabilities at some places of a row, and probabilities, which are 0 behind its end."""
    inside_B = place_B < size
    log_B = tl.load(logits + place_B, mask=inside_B, other=0.0).to(tl.float32) * scale - norm
    return log_B, tl.where(inside_B, tl.exp(log_B), 0.0)


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    student,
    teacher,
    targets,
    values,
    nats,
    student_stride,
    teacher_stride,
    size,
    scale,
    share,
    weight,
    softmax,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    target = tl.load(targets + row)
    # Before the sums over all threads: none of them overwrites it until all have come to those.
    known = (target >= 0) & (target < size)
    at_target = tl.load(student + target, mask=known, other=float("nan")).to(tl.float32) * scale
    norm_q = _normaliser(student, size, scale, BLOCK)
    norm_p = _normaliser(teacher, size, scale, BLOCK)
    tl.store(nats + row, norm_q - at_target)
    tiny = 1.1754943508222875e-38
    value_B = tl.zeros((BLOCK,), tl.float32)
    mean_B = tl.zeros((BLOCK,), tl.float32)
    if KIND != "forward_kl":
        for begin in range(0, size, BLOCK):
            place_B = begin + tl.arange(0, BLOCK)
            log_q_B, q_B = _probabilities(student, place_B, size, scale, norm_q)
            log_p_B, p_B = _probabilities(teacher, place_B, size, scale, norm_p)
            if KIND == "reverse_kl":
                mean_B += q_B * (log_q_B - log_p_B)
            else:
                m_B = tl.maximum(q_B + share * (p_B - q_B), tiny)
                if KIND == "jsd":
                    mean_B += q_B * tl.log(tl.maximum(q_B / m_B, tiny))
                    value_B += p_B * tl.log(tl.maximum(p_B / m_B, tiny))
                else:
                    mean_B += q_B * (p_B / m_B)
                    value_B += p_B * tl.log(tl.maximum(p_B / m_B, tiny))
    mean = tl.sum(mean_B, 0)
    for begin in range(0, size, BLOCK):
        place_B = begin + tl.arange(0, BLOCK)
        log_q_B, q_B = _probabilities(student, place_B, size, scale, norm_q)
        log_p_B, p_B = _probabilities(teacher, place_B, size, scale, norm_p)
        if KIND == "forward_kl":
            value_B += p_B * (log_p_B - log_q_B)
            slope_B = q_B - p_B
        elif KIND == "reverse_kl":
            slope_B = q_B * (log_q_B - log_p_B - mean)
        else:
            m_B = tl.maximum(q_B + share * (p_B - q_B), tiny)
            if KIND == "jsd":
                slope_B = (1 - share) * q_B * (tl.log(tl.maximum(q_B / m_B, tiny)) - mean)
            else:
                slope_B = (share - 1) * q_B * (p_B / m_B - mean)
        gradient_B = weight * slope_B + softmax * (q_B - tl.where(place_B == target, 1.0, 0.0))
        tl.store(student + place_B, gradient_B, mask=place_B < size)
    value = tl.sum(value_B, 0)
    if KIND == "reverse_kl":
        value = mean
    if KIND == "jsd":
        value = share * value + (1 - share) * mean
    # Not by maximum, which makes a number of NaN; the sums lose it too, the normalisers do not.
    value = tl.where(value < 0, 0.0, value)
    both = norm_q + norm_p
    tl.store(values + row, tl.where(both - both == 0, value, float("nan")))
