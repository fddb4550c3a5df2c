"""Forward KL from a teacher of whom only the likeliest tokens are known, with all others in one bucket.

    KL = sum over the k tokens of p log p/q  +  P log P/Q      P, Q = teacher's, student's mass outside the k tokens

and the gradient by the student's logits: q_v - p_v for a token v of the k, q_v (1 - P/Q) for any other. By the
data-processing inequality it is at most the full KL. It is that KL where k is the vocabulary, and where p and q share
out the rest alike; how the teacher tells the other tokens apart is not in it. Legend: `C` tokens of a chunk, `V`
vocabulary, `k` tokens that are known.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lcprune.distillation.divergences import Weights

Index: TypeAlias = Tensor | slice
"""Which of the leading places are taken."""


@dataclass(frozen=True, eq=False)
class Buckets:
    """What is known of a distribution at every place."""

    ids: Tensor
    """The likeliest tokens [..., k], int32, no token twice."""
    log_p: Tensor
    """Their log-probabilities [..., k]."""
    log_tail: Tensor
    """Log of what all other tokens have together [...]; -inf where there are none."""

    def __getitem__(self, index: Index) -> "Buckets":
        """Some of the places."""
        return Buckets(self.ids[index], self.log_p[index], self.log_tail[index])


def top(logits_CV: Tensor, k: int) -> Buckets:
    """The k likeliest tokens of every row, the likeliest first, and the mass of the rest; in the logits' dtype."""
    log_p_CV = torch.log_softmax(logits_CV, -1)
    log_p_Ck, ids_Ck = log_p_CV.topk(k)
    shift_C, sum_C = _rest(log_p_CV, ids_Ck, out=log_p_CV)
    return Buckets(ids_Ck.int(), log_p_Ck, shift_C + sum_C.log())


def value_and_gradient(
    log_q_CV: Tensor, teacher: Buckets, weights: Weights, *, out_CV: Tensor
) -> tuple[Tensor, Tensor]:
    """The KL [C] of every token, and the gradient [C, V] of the weighted sum with respect to the student's logits.

    Args:
        log_q_CV: The student's log-probabilities; used up.
        teacher: The teacher's, of C places.
        weights: Factor of the KL, and of q, which is what cross-entropy adds outside its targets.
        out_CV: Where the gradient goes.
    """
    ids_Ck, log_p_Ck = teacher.ids.long(), teacher.log_p.to(log_q_CV.dtype)
    log_tail_C = teacher.log_tail.to(log_q_CV.dtype)
    p_Ck, tail_C, log_q_Ck = log_p_Ck.exp(), log_tail_C.exp(), log_q_CV.gather(1, ids_Ck)
    shift_C, sum_C = _rest(log_q_CV, ids_Ck, out=out_CV)
    value_C = (p_Ck * (log_p_Ck - log_q_Ck)).sum(-1)
    # Where there is no bucket, its term is 0 and not 0 times infinity.
    value_C += torch.where(tail_C > 0, tail_C * (log_tail_C - (shift_C + sum_C.log())), 0.0)
    total = weights.divergence + weights.softmax
    out_CV *= (total * shift_C.exp() - weights.divergence * tail_C / sum_C.clamp(min=1))[:, None]
    out_CV.scatter_(1, ids_Ck, total * log_q_Ck.exp() - weights.divergence * p_Ck)
    # Rounded up to 0 token by token, as in divergences.py.
    return value_C.clamp_(min=0), out_CV


def _rest(log_CV: Tensor, ids_Ck: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens outside the k: `out` gets their probabilities over exp(shift), 0 for the k; log_CV is used up.

    Shifted by the largest of them, so that neither of their shares is lost where all are tiny; and summed up, since one
    minus the k would be rounding errors.

    Returns:
        The shift [C] and the sum [C]: at least 1, or 0 where there are no such tokens.
    """
    shift_C = log_CV.scatter_(1, ids_Ck, -torch.inf).amax(-1)
    finite_C = shift_C.masked_fill(shift_C == -torch.inf, 0)
    return finite_C, torch.sub(log_CV, finite_C[:, None], out=out).exp_().sum(-1)
