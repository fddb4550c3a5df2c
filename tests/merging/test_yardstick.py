"""The development yardstick on the demo model: what one-shot dropping by BlockInfluence removes, and what it costs."""

from pathlib import Path

import pytest

from lcprune.demo import DEMO, load_tokenizer
from lcprune.distillation.teacher import load
from tests.benchmarks.yardstick import METHODS, Yardstick

# Beside the checkout, no part of the package.
TEXT = Path(__file__).resolve().parents[2].parent / "shared/data/eval/wikitext2_tokens_valid.txt"


@pytest.mark.model
@pytest.mark.skipif(not TEXT.is_file(), reason=f"the WikiText-2 validation text is not at {TEXT}")
def test_dropping_by_block_influence_measures_as_published_in_methods():
    model = load(DEMO, "bfloat16")
    yardstick = Yardstick.of(TEXT.read_text(encoding="utf-8"), load_tokenizer(DEMO))
    dense = yardstick.perplexity(model)
    results = yardstick.measure(model, METHODS["bi-drop"], [27, 24, 22], dense)
    assert [results[depth]["removed"] for depth in (27, 24, 22)] == [
        [25, 13, 14],
        [25, 13, 14, 12, 26, 17],
        [25, 13, 14, 12, 26, 17, 15, 3],
    ]
    measured = [dense, *(results[depth]["perplexity"] for depth in (27, 24, 22))]
    assert measured == pytest.approx([30.8, 45.9, 66.9, 101.7], rel=0.03)
