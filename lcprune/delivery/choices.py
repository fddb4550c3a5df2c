r"""Multiple-choice questions out of a file, answered by log-likelihood: no network, no library beside transformers.

    {"context": "Question: ...\nAnswer:", "choices": ["one", "another"], "label": 0}       a row of TASK.jsonl

    score(choice) = log p(" " + choice | context)        nats, summed over the tokens of the choice
    acc             the right choice has the highest score
    acc_norm        it has the highest score per character of the choice

These are the definitions of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).
One thing differs: where a tokenizer puts a BOS before a text, a question gets it too, as the texts of training do.
Legend: `B` batch, `T` tokens, `D` hidden.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lcprune.errors import InputError
from lcprune.merging.calibration import evaluating, hidden_states, logits
from lcprune.merging.progress import track

TOKENS_AT_ONCE = 2048
"""Of a batch, padding included, unless one question alone is longer."""


@dataclass(frozen=True)
class Question:
    """A row of a task."""

    context: str
    """What comes before the choice."""
    choices: tuple[str, ...]
    """What may follow, without the space between."""
    label: int
    """Place of the right choice."""


@dataclass(frozen=True)
class Answers:
    """Whether each question was answered rightly."""

    acc: tuple[bool, ...]
    """By the highest log-likelihood."""
    acc_norm: tuple[bool, ...]
    """By the highest log-likelihood per character."""


@dataclass(frozen=True)
class _Sentence:
    """A context with one of its choices."""

    ids: Tensor
    """Tokens [T]."""
    start: int
    """The first that belongs to the choice; at least 1."""
    characters: int
    """Length of the choice as text."""


def read(path: Path, limit: int | None = None) -> list[Question]:
    """The questions of a file, or so many of them, evenly spaced over it.

    Args:
        path: JSON lines with `context`, `choices` and `label`; other keys are left alone.
        limit: At most so many.

    Raises:
        InputError: The file cannot be read, is empty, or a row is no such question.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a row may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The task file {path} cannot be read ({error}).") from error
    rows = [_question(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"The task file {path} holds no rows: give it lines with context, choices and label.")
    number = len(rows) if limit is None else min(limit, len(rows))
    return [rows[place * len(rows) // number] for place in range(number)]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], what: str = "questions"
) -> Answers:
    """Lets a model choose.

    Args:
        model: A causal LM, not changed.
        tokenizer: The model's.
        questions: Each is scored by itself; a context too long for the model's positions loses its beginning.
        what: Name of the task, for the progress bar.
    """
    sentences = [_sentence(model, tokenizer, row.context, choice) for row in questions for choice in row.choices]
    scores = _likelihoods(model, sentences, what)
    rest = iter(zip(scores, sentences, strict=True))
    acc, acc_norm = [], []
    for row in questions:
        mine = [next(rest) for _ in row.choices]
        acc.append(_best([score for score, _ in mine]) == row.label)
        acc_norm.append(_best([score / one.characters for score, one in mine]) == row.label)
    return Answers(tuple(acc), tuple(acc_norm))


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _question(line: str, place: str) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is not JSON ({error}).") from error
    context, choices, label = (row.get(key) if isinstance(row, dict) else None for key in Question.__annotations__)
    if not isinstance(context, str):
        raise InputError(f"{place}: context={context!r} must be text.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise InputError(f"{place}: choices={choices!r} must be a list of two texts or more, none of them empty.")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise InputError(f"{place}: label={label!r} must be the place of the right choice, 0 to {len(choices) - 1}.")
    return Question(context, tuple(choices), label)


def _sentence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> _Sentence:
    ids = tokenizer(f"{context} {choice}", add_special_tokens=False, verbose=False).input_ids
    # Blanks at the end of a context are scored with the choice, as in lm-eval: in tokens they are one with it.
    start = len(tokenizer(context.rstrip(), add_special_tokens=False, verbose=False).input_ids)
    begin = _begin(tokenizer, start)
    ids, start = [*begin, *ids], start + len(begin)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or len(ids)
    cut = max(0, len(ids) - longest)
    return _Sentence(torch.tensor(ids[cut:]), max(1, start - cut), len(choice))


def _begin(tokenizer: PreTrainedTokenizerBase, start: int) -> list[int]:
    """The BOS where the tokenizer itself puts one; before a choice without a context anything that is known."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and tokenizer("a").input_ids[0] == bos:
        return [bos]  # type: ignore[list-item]
    return [] if start else [eos if bos is None else bos]  # type: ignore[list-item]


def _likelihoods(model: PreTrainedModel, sentences: Sequence[_Sentence], what: str) -> list[float]:
    """Log-likelihood in nats of every choice behind its context, in the order given."""
    by_length = sorted(range(len(sentences)), key=lambda place: len(sentences[place].ids))
    batches = list(_batches([sentences[place] for place in by_length]))
    scores = [0.0] * len(sentences)
    values = (value for batch in track(batches, f"answering {what}") for value in _scored(model, batch))
    for place, value in zip(by_length, values, strict=True):
        scores[place] = value
    return scores


def _scored(model: PreTrainedModel, batch: Sequence[_Sentence]) -> list[float]:
    """Scores of one batch; logits exist for the tokens of one choice at a time."""
    ids_BT = pad_sequence([one.ids for one in batch], batch_first=True)
    mask_BT = pad_sequence([torch.ones_like(one.ids) for one in batch], batch_first=True)
    with evaluating(model):
        states_BTD = hidden_states(model, {"input_ids": ids_BT, "attention_mask": mask_BT})
        values = []
        for one, states_TD in zip(batch, states_BTD, strict=True):
            end = len(one.ids)
            scored = logits(model, states_TD[one.start - 1 : end - 1]).float()
            values.append(-cross_entropy(scored, one.ids[one.start :].to(scored.device), reduction="sum").item())
    return values


def _batches(sentences: Sequence[_Sentence]) -> Iterator[list[_Sentence]]:
    """Sentences in the order given, shortest first, about `TOKENS_AT_ONCE` tokens to a batch."""
    batch: list[_Sentence] = []
    for one in sentences:
        if batch and (len(batch) + 1) * len(one.ids) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
