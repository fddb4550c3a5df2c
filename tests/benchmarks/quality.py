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
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune.delivery import choices
from lcprune.delivery.choices import Question
from lcprune.demo import DEMO
from lcprune.distillation.teacher import load
from lcprune.models import load_tokenizer
from tests.benchmarks.yardstick import Yardstick

TASKS = ("piqa", "arc_easy")
BY_CHARACTER = ("arc_easy",)
"""Tasks that acc_norm judges; the others acc."""


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, questions: Sequence[Question]
) -> Sequence[bool]:
    """Whether the model answers each question rightly."""
    found = choices.answer(model, tokenizer, questions, task)
    return found.acc_norm if task in BY_CHARACTER else found.acc


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
    rows = {task: choices.read(given.data / f"{task}.jsonl", given.rows) for task in TASKS}
    perplexities: dict[str, float] = {}
    right: dict[str, dict[str, Sequence[bool]]] = {}
    for who, name in {"teacher": given.teacher, "student": given.student}.items():
        model = load(name, given.dtype)
        perplexities[who] = yardstick.perplexity(model)
        right[who] = {task: answers(model, tokenizer, task, rows[task]) for task in TASKS}
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
