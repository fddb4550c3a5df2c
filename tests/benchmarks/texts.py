"""The texts of README's figures with training: `python tests/benchmarks/texts.py DATA runs/texts`.

    first_half.txt      what best.yaml is calibrated on: the WikiText-2 validation text before the yardstick evaluates
    mix.jsonl           what the student is distilled on: all paragraphs of DATA/text/wikipedia_paragraphs.jsonl and 350
                        pieces of 2,000 characters from DATA/text/openstax.jsonl, shuffled; the same at every call
    calibration.jsonl   both of them, half and half by characters

DATA holds text/*.jsonl with {"text"} in every row and eval/wikitext2_tokens_valid.txt. The tasks by which a student is
judged afterwards (eval/piqa.jsonl, eval/arc_easy.jsonl) are described in quality.py.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune.demo import DEMO
from lcprune.models import load_tokenizer
from tests.benchmarks.yardstick import EVALUATION_START

PIECE, PIECES = 2000, 350
"""Characters of a piece of openstax.jsonl, and how many pieces are taken."""


def first_half(text: str, tokenizer_name: str) -> str:
    """The text before the yardstick's evaluation windows."""
    tokenizer = load_tokenizer(tokenizer_name)
    half: str = tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:EVALUATION_START])
    return half


def mix(paragraphs: list[str], books: list[str]) -> list[str]:
    """All of the paragraphs and some of the books' pieces, in an order of their own."""
    chance = random.Random(0)
    pieces = [book[start : start + PIECE] for book in books for start in range(0, len(book), PIECE)]
    chance.shuffle(pieces)
    mixed = [*paragraphs, *pieces[:PIECES]]
    chance.shuffle(mixed)
    return mixed


def both(half: str, mixed: list[str]) -> list[str]:
    """The text, and as many characters of the others, to the end of one of them."""
    taken, characters = [half], 0
    for text in mixed:
        if characters >= len(half):
            break
        taken.append(text)
        characters += len(text)
    return taken


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Writes both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=DEMO)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    wiki = (given.data / "eval" / "wikitext2_tokens_valid.txt").read_text(encoding="utf-8")
    half = first_half(wiki, given.model)
    (given.out / "first_half.txt").write_text(half, encoding="utf-8")
    folder = given.data / "text"
    mixed = mix(_texts(folder / "wikipedia_paragraphs.jsonl"), _texts(folder / "openstax.jsonl"))
    _write(given.out / "mix.jsonl", mixed)
    _write(given.out / "calibration.jsonl", both(half, mixed))


if __name__ == "__main__":
    main()
