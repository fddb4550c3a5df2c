"""How far a student's next-token distribution is from its teacher's, and the gradient, token by token.

With p the teacher's and q the student's distribution, both softened by a temperature t, and y the student's logits
over t:

    forward_kl    KL(p || q)                                            gradient q - p
    reverse_kl    KL(q || p)                                            q (log q/p - KL)
    skew_kl       KL(p || m),  m = a p + (1 - a) q                      (1 - a) q (sum_v q p/m - p/m)
    jsd           b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q    (1 - b) q (log q/m - KL(q || m))

skew_kl is DistiLLM's skew KL (arXiv:2402.03898, a = 0.1): bounded by log 1/a, where forward KL has no bound. jsd is
GKD's generalised Jensen-Shannon divergence (arXiv:2306.13649): symmetric at b = 1/2, near b KL(p || q) for small b.
Every one is 0 at p = q and never negative; values are in nats.

The functions overwrite what they are given: on CPUs fresh pages for every temporary cost more than the arithmetic on
them. Legend: `C` tokens of a chunk, `V` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Divergence:
    """Which divergence is meant, and of which distributions."""

    kind: Kind = "forward_kl"
    """Name of the formula."""
    temperature: float = 1.0
    """Divides both models' logits; the value is multiplied by its square (Hinton, arXiv:1503.02531)."""
    share: float = 0.5
    """The teacher's share of the mixture m: a of skew_kl, b of jsd, between 0 and 1; others have no mixture."""


@dataclass(frozen=True)
class Chunk:
    """Four buffers [C, V]: the log-probabilities of some tokens, and two that are free."""

    log_q: Tensor
    """The student's."""
    log_p: Tensor
    """The teacher's."""
    free: tuple[Tensor, Tensor]
    """Whatever they hold is overwritten."""


@dataclass(frozen=True)
class Weights:
    """What the gradient is of: the divergence's sum times a factor. A multiple of q is added to it at no cost."""

    divergence: float
    """Factor of the divergence."""
    softmax: float = 0.0
    """Factor of q, which is what cross-entropy adds outside its targets."""


def value_and_gradient(chunk: Chunk, divergence: Divergence, weights: Weights) -> tuple[Tensor, Tensor]:
    """The divergence [C] of every token, and the gradient [C, V] of the weighted sum with respect to y.

    All four buffers are used up; the gradient lies in one of them. Neither knows the temperature: the log-probabilities
    are softened already, and the factors t**2 and dy/dz = 1/t are the caller's.
    """
    value_C, grad_CV = _FORMULAS[divergence.kind](chunk, divergence.share, weights)
    # Rounded up to 0 token by token: at equality rounding alone can make a tiny divergence negative.
    return value_C.clamp_(min=0), grad_CV


def _forward_kl(chunk: Chunk, share: float, weights: Weights) -> tuple[Tensor, Tensor]:
    grad_CV = torch.exp(chunk.log_q, out=chunk.free[0])
    p_CV = torch.exp(chunk.log_p, out=chunk.free[1])
    if weights.divergence + weights.softmax != 1:
        grad_CV *= weights.divergence + weights.softmax
    grad_CV.sub_(p_CV, alpha=weights.divergence)
    return _dot(p_CV, chunk.log_p.sub_(chunk.log_q)), grad_CV


def _reverse_kl(chunk: Chunk, share: float, weights: Weights) -> tuple[Tensor, Tensor]:
    q_CV = torch.exp(chunk.log_q, out=chunk.free[0])
    ratio_CV = chunk.log_q.sub_(chunk.log_p)
    value_C = _dot(q_CV, ratio_CV)
    return value_C, _centred(q_CV, ratio_CV, value_C, weights.divergence, weights.softmax)


def _skew_kl(chunk: Chunk, share: float, weights: Weights) -> tuple[Tensor, Tensor]:
    q_CV, p_CV, m_CV = _mixture(chunk, share)
    ratio_CV = torch.div(p_CV, m_CV, out=chunk.log_p)
    value_C = _dot(p_CV, _log(ratio_CV, out=m_CV))
    return value_C, _centred(q_CV, ratio_CV, _dot(q_CV, ratio_CV), (share - 1) * weights.divergence, weights.softmax)


def _jsd(chunk: Chunk, share: float, weights: Weights) -> tuple[Tensor, Tensor]:
    q_CV, p_CV, m_CV = _mixture(chunk, share)
    ratio_CV = torch.div(q_CV, m_CV, out=chunk.log_p)
    ratio_CV = _log(ratio_CV, out=ratio_CV)
    student_C = _dot(q_CV, ratio_CV)
    teacher_CV = torch.div(p_CV, m_CV, out=m_CV)
    teacher_C = _dot(p_CV, _log(teacher_CV, out=teacher_CV))
    value_C = share * teacher_C + (1 - share) * student_C
    return value_C, _centred(q_CV, ratio_CV, student_C, (1 - share) * weights.divergence, weights.softmax)


_FORMULAS: dict[str, Callable[[Chunk, float, Weights], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "skew_kl": _skew_kl,
    "jsd": _jsd,
}


def _mixture(chunk: Chunk, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Fills the free buffers with q and p, log_q's with m = share * p + (1 - share) * q, exactly q where p = q."""
    q_CV = torch.exp(chunk.log_q, out=chunk.free[0])
    p_CV = torch.exp(chunk.log_p, out=chunk.free[1])
    m_CV = torch.lerp(q_CV, p_CV, share, out=chunk.log_q)
    # Where both are below what the dtype can tell from 0, the ratios are 0 and not 0/0.
    return q_CV, p_CV, m_CV.clamp_(min=torch.finfo(m_CV.dtype).tiny)


def _log(ratio_CV: Tensor, *, out: Tensor) -> Tensor:
    """Logarithm, finite at 0: it is always multiplied by what is 0 there."""
    torch.clamp(ratio_CV, min=torch.finfo(ratio_CV.dtype).tiny, out=out)
    return out.log_()


def _centred(q_CV: Tensor, slope_CV: Tensor, mean_C: Tensor, weight: float, softmax: float) -> Tensor:
    """Returns weight * q * (slope - mean) + softmax * q: from the slope dD/dq to the gradient through the softmax."""
    slope_CV.sub_((mean_C - softmax / weight)[:, None])
    q_CV.mul_(slope_CV)
    return q_CV if weight == 1 else q_CV.mul_(weight)


def _dot(left_CV: Tensor, right_CV: Tensor) -> Tensor:
    """Sum over V of the products, per row, without a temporary."""
    return torch.bmm(left_CV[:, None], right_CV[:, :, None]).flatten()
