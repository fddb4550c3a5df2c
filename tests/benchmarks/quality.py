"""What a student has kept of its teacher: `python tests/benchmarks/quality.py short/ --data DATA/eval`.

    perplexity   the yardstick's evaluation windows (yardstick.py): second half of the WikiText-2 validation text
    piqa         accuracy: the choice with the greatest log-likelihood behind the context
    arc_easy     the same, log-likelihoods divided by the number of characters of the choice (acc_norm)

DATA/eval holds wikitext2_tokens_valid.txt, and piqa.jsonl and arc_easy.jsonl with {"context", "choices", "label"} in
every row; a choice is scored as " " + choice. Teacher and student answer the same rows, evenly spaced over the file.
The last line is one JSON object: `perplexity_ratio`, `piqa_retained` and `arc_easy_retained` (student / teacher), the
figures behind them, and how many rows only one of the two gets right.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune.demo import DEMO, load_tokenizer
from lcprune.distillation.teacher import load
from lcprune.merging.calibration import evaluating, hidden_states, logits
from tests.benchmarks.yardstick import Yardstick

TASKS = {"piqa": False, "arc_easy": True}
"""By name, and whether log-likelihoods are divided by the characters of the choice."""
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Row:
    """A question."""

    context: str
    choices: Sequence[str]
    label: int


@dataclass(frozen=True)
class Sentence:
    """A context with one of its choices, and from which token on it counts."""

    ids: Tensor
    start: int
    characters: int


def rows_of(path: Path, number: int) -> list[Row]:
    """So many rows of a task, evenly spaced."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    number = min(number, len(rows))
    chosen = (rows[place * len(rows) // number] for place in range(number))
    return [Row(row["context"], row["choices"], row["label"]) for row in chosen]


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, by_character: bool
) -> list[bool]:
    """Whether the model answers each row rightly."""
    sentences = [_sentence(tokenizer, row.context, choice) for row in rows for choice in row.choices]
    by_length = sorted(range(len(sentences)), key=lambda place: len(sentences[place].ids))
    scores = [0.0] * len(sentences)
    values = (
        value for batch in _batches([sentences[place] for place in by_length]) for value in likelihoods(model, batch)
    )
    for place, value in zip(by_length, values, strict=True):
        scores[place] = value / sentences[place].characters if by_character else value
    rest = iter(scores)
    answered = [[next(rest) for _ in row.choices] for row in rows]
    return [mine.index(max(mine)) == row.label for mine, row in zip(answered, rows, strict=True)]


def likelihoods(model: PreTrainedModel, batch: Sequence[Sentence]) -> list[float]:
    """Log-likelihood in nats of every choice behind its context; logits exist for tokens of choices only."""
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


def _sentence(tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> Sentence:
    ids = tokenizer(f"{context} {choice}", add_special_tokens=False).input_ids
    start = len(tokenizer(context, add_special_tokens=False).input_ids)
    return Sentence(torch.tensor(ids), start, len(choice))


def _batches(sentences: Sequence[Sentence]) -> list[list[Sentence]]:
    """Sentences of like length together, about `TOKENS_AT_ONCE` tokens in a batch."""
    batches: list[list[Sentence]] = []
    for one in sentences:
        if not batches or (len(batches[-1]) + 1) * len(one.ids) > TOKENS_AT_ONCE:
            batches.append([])
        batches[-1].append(one)
    return batches


def main() -> None:
    """Measures both models and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="folder of the shortened model")
    parser.add_argument("--teacher", default=DEMO)
    parser.add_argument("--data", type=Path, required=True, help="folder with the text and the tasks")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.teacher)
    yardstick = Yardstick.of((given.data / "wikitext2_tokens_valid.txt").read_text(encoding="utf-8"), tokenizer)
    rows = {task: rows_of(given.data / f"{task}.jsonl", given.rows) for task in TASKS}
    perplexities: dict[str, float] = {}
    right: dict[str, dict[str, list[bool]]] = {}
    for who, name in {"teacher": given.teacher, "student": given.student}.items():
        model = load(name, given.dtype)
        perplexities[who] = yardstick.perplexity(model)
        right[who] = {task: answers(model, tokenizer, rows[task], by_character=TASKS[task]) for task in TASKS}
        shares = ", ".join(f"{task} {sum(found) / len(found):.3f}" for task, found in right[who].items())
        print(f"{who}: perplexity {perplexities[who]:.2f}, {shares}", flush=True)
    figures: dict[str, object] = {
        "perplexity_ratio": round(perplexities["student"] / perplexities["teacher"], 4),
        "perplexity": {who: round(value, 3) for who, value in perplexities.items()},
    }
    for task in TASKS:
        teacher, student = right["teacher"][task], right["student"][task]
        figures[f"{task}_retained"] = round(sum(student) / sum(teacher), 4)
        figures[task] = {
            "rows": len(teacher),
            "teacher": round(sum(teacher) / len(teacher), 4),
            "student": round(sum(student) / len(student), 4),
            "teacher_only": sum(a and not b for a, b in zip(teacher, student, strict=True)),
            "student_only": sum(b and not a for a, b in zip(teacher, student, strict=True)),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
