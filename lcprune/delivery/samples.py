"""What teacher and student write, side by side: both go on, greedily, from the same few words of held-out text.

A conversation is given up to its first answer, of which both write their own. Legend: `B` rows, `T` tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lcprune.delivery.decoding import continuations
from lcprune.merging.calibration import Batch
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
            teacher=_text(tokenizer, continuations(teacher, ids_T[None], ANSWER, "teacher")[0]),
            student=_text(tokenizer, continuations(student, ids_T[None], ANSWER, "student")[0]),
        )
        for ids_T in track(begun, "generating text")
    )


def openings(batch: Batch) -> list[Tensor]:
    """What rows begin with [T] each: a conversation up to an answer, other text its first tokens; not padding."""
    ids_BT = batch["input_ids"]
    found = []
    for row, ids_T in enumerate(ids_BT):
        one = {name: tensor[row] for name, tensor in batch.items() if tensor.shape == ids_BT.shape}
        read_T = one["attention_mask"].bool() if "attention_mask" in one else torch.ones_like(ids_T, dtype=torch.bool)
        answer = _first_answer(one["labels"], read_T) if "labels" in one else None
        if answer is None:
            ids_T = ids_T[read_T]
            found.append(ids_T[: min(PROMPT, max(1, len(ids_T) // 2))])
        else:
            found.append(ids_T[_beginning(one, read_T, answer) : answer])
    return [ids_T for ids_T in found if len(ids_T)]


def _first_answer(labels_T: Tensor, read_T: Tensor) -> int | None:
    """The first learned token behind two or more that are only read; the first of any document is never learned."""
    learned_T, given_T = (labels_T != -100) & read_T, (labels_T == -100) & read_T
    starts = (learned_T[2:] & given_T[1:-1] & given_T[:-2]).nonzero().flatten()
    return int(starts[0]) + 2 if len(starts) else None


def _beginning(row: Mapping[str, Tensor], read_T: Tensor, answer: int) -> int:
    """Where the document of a row begins that this token belongs to."""
    if "position_ids" in row:
        return int((row["position_ids"][: answer + 1] == 0).nonzero()[-1])
    return int(read_T.nonzero()[0])


def _text(tokenizer: PreTrainedTokenizerBase, ids_T: Tensor | list[int]) -> str:
    return str(tokenizer.decode(ids_T, skip_special_tokens=True))
