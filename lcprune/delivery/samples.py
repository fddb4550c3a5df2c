"""What teacher and student write, side by side: both go on, greedily, from the same few words of held-out text.

A conversation is given up to its first answer, of which both write their own. Legend: `B` rows, `T` tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lcprune.delivery.decoding import all_continuations
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
    """What `count` sequences, spread evenly over the batches, begin with: [T] each."""
    found = [one for batch in batches for one in openings(batch)]
    return [found[index * len(found) // count] for index in range(min(count, len(found)))] if count else []


def side_by_side(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, begun: Sequence[Tensor]
) -> tuple[Sample, ...]:
    """Lets both models go on from every prompt, at most `ANSWER` tokens."""
    return tuple(
        Sample(
            prompt=_text(tokenizer, ids_T),
            teacher=_text(tokenizer, all_continuations(teacher, [ids_T], ANSWER, "teacher")[0]),
            student=_text(tokenizer, all_continuations(student, [ids_T], ANSWER, "student")[0]),
        )
        for ids_T in track(begun, "generating text")
    )


def openings(batch: Batch) -> list[Tensor]:
    """What rows begin with [T] each: a conversation up to an answer, other text its first tokens; never filler.

    Of a row that holds several documents, one that is answered, else the first.
    """
    ids_BT, mask_BT = batch["input_ids"], mask_of(batch)
    document_BT = (batch["position_ids"] == 0).cumsum(1) if "position_ids" in batch else torch.zeros_like(ids_BT)
    found = []
    for row, (ids_T, document_T) in enumerate(zip(ids_BT, document_BT, strict=True)):
        read_T = torch.ones_like(ids_T, dtype=torch.bool) if mask_BT is None else mask_BT[row]
        if not read_T.any():
            continue
        answer = _first_answer(batch["labels"][row], read_T) if "labels" in batch else None
        place = int(read_T.nonzero()[0]) if answer is None else answer
        mine_T = read_T & (document_T == document_T[place])
        if answer is None:
            ids_T = ids_T[mine_T]
            found.append(ids_T[: min(PROMPT, max(1, len(ids_T) // 2))])
        else:
            found.append(ids_T[:answer][mine_T[:answer]])
    return found


def _first_answer(labels_T: Tensor, read_T: Tensor) -> int | None:
    """The first learned token behind two or more that are only read; the first of any document is never learned."""
    learned_T, given_T = (labels_T != -100) & read_T, (labels_T == -100) & read_T
    starts = (learned_T[2:] & given_T[1:-1] & given_T[:-2]).nonzero().flatten()
    return int(starts[0]) + 2 if len(starts) else None


def _text(tokenizer: PreTrainedTokenizerBase, ids_T: Tensor | list[int]) -> str:
    return str(tokenizer.decode(ids_T, skip_special_tokens=True))
