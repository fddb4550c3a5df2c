"""A student beside its teacher on held-out text, outside a trainer: what `validate` measures, and the divergence.

    perplexity   exp(mean cross-entropy of the next token)                of both
    agreement    share of positions at which both find the same token likeliest
    kl           mean KL(teacher || student) of the next token, in nats

Logits exist for one chunk of tokens at a time. Legend: `N` scored positions, `D` hidden.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel

from lcprune.distillation.losses import head_loss
from lcprune.distillation.metrics import HeldOut
from lcprune.distillation.teacher import Teacher, head_of
from lcprune.merging.calibration import Batch, evaluating, hidden_states, next_tokens, token_loss
from lcprune.merging.criteria import perplexity


@dataclass(frozen=True)
class Comparison:
    """Means over all scored tokens of a text."""

    perplexity: float
    """The student's."""
    teacher_perplexity: float
    """The teacher's."""
    agreement: float
    """Share of tokens, 0 to 1."""
    kl: float
    """Nats per token."""
    tokens: int
    """How many were scored."""


def compare(student: PreTrainedModel, teacher: Teacher, batches: Iterable[Batch]) -> Comparison:
    """Student beside teacher; both are left as they were.

    The figures are those that a run logs as `val/...` for the same weights and batches. A run may differ in the last
    digits where it computes in another precision than this is called in, or on another device.

    Args:
        student: Runs in the precision of the caller, autocast included, as in training.
        teacher: Runs in its own dtype, as in training.
        batches: `input_ids` [B, T], and what says which tokens are scored.
    """
    metric = HeldOut().to(student.device)
    mine, theirs = head_of(student).detach(), teacher.head.detach()
    divergence, tokens = 0.0, 0
    with evaluating(student):
        for given in batches:
            batch = {name: tensor.to(student.device) for name, tensor in given.items()}
            targets_BT = next_tokens(batch)
            keep_BT = targets_BT != -100
            targets_N, student_ND = targets_BT[keep_BT], hidden_states(student, batch)[keep_BT]
            last = teacher(batch).last
            assert last is not None
            teacher_ND = last[keep_BT]
            metric.update(student_ND, mine, teacher_ND, theirs, targets_N)
            loss = head_loss(student_ND, mine, teacher_ND, theirs, targets_N=targets_N)
            divergence, tokens = divergence + loss.logits.item() * loss.tokens, tokens + loss.tokens
    found = {name: value.item() for name, value in metric.compute().items()}
    return Comparison(
        found["perplexity"], found["teacher_perplexity"], found["agreement"], divergence / max(tokens, 1), tokens
    )


def alone(model: PreTrainedModel, batches: Iterable[Batch]) -> tuple[float, int]:
    """Perplexity of a model that has no teacher, and over how many tokens."""
    nats, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            loss, tokens = token_loss(model, hidden_states(model, batch), batch)
            nats, count = nats + loss, count + tokens
    return perplexity(nats, count), count
