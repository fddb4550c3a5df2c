"""What teacher and student write, side by side: both go on, greedily, from the same few words of held-out text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lcprune.delivery.decoding import continuations
from lcprune.merging.calibration import Batch, mask_of
from lcprune.merging.progress import track

PROMPT, ANSWER = 32, 48
"""Tokens of a prompt, and of what a model makes of it at most."""


@dataclass(frozen=True)
class Sample:
    """One prompt and two continuations."""

    prompt: str
    """From the run's held-out text."""
    teacher: str
    """How the teacher goes on."""
    student: str
    """How the student goes on."""


def prompts(batches: Iterable[Batch], count: int) -> list[Tensor]:
    """The first tokens [T] of `count` sequences, spread evenly over the batches."""
    rows = [row for batch in batches for row in _rows(batch)]
    chosen = [rows[index * len(rows) // count] for index in range(min(count, len(rows)))] if count else []
    return [row[: min(PROMPT, max(1, len(row) // 2))] for row in chosen]


def side_by_side(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, begun: Sequence[Tensor]
) -> tuple[Sample, ...]:
    """Lets both models go on from every prompt, at most `ANSWER` tokens."""
    return tuple(
        Sample(
            prompt=_text(tokenizer, ids_T),
            teacher=_text(tokenizer, continuations(teacher, ids_T[None], ANSWER, "teacher")[0]),
            student=_text(tokenizer, continuations(student, ids_T[None], ANSWER, "student")[0]),
        )
        for ids_T in track(begun, "generating text")
    )


def _rows(batch: Batch) -> list[Tensor]:
    mask_BT = mask_of(batch)
    ids_BT = batch["input_ids"]
    return [ids_T if mask_BT is None else ids_T[mask_BT[row]] for row, ids_T in enumerate(ids_BT)]


def _text(tokenizer: PreTrainedTokenizerBase, ids_T: Tensor | list[int]) -> str:
    return str(tokenizer.decode(ids_T, skip_special_tokens=True))
