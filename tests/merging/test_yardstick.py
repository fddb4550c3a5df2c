"""The development yardstick: its short cuts change no figure, it survives interruption, and what it says of BI."""

from dataclasses import replace
from pathlib import Path

import pytest

from lcprune.demo import DEMO
from lcprune.distillation.teacher import load
from lcprune.errors import InputError
from lcprune.merging.calibration import Batch
from lcprune.merging.collapse import collapse
from lcprune.merging.planners import ThresholdPlanner
from lcprune.models import load_tokenizer
from tests.benchmarks.bench import Bench
from tests.benchmarks.methods import METHODS, OPERATORS, named
from tests.benchmarks.results import Results, grids, shown
from tests.benchmarks.yardstick import Yardstick, cell, measure_all
from tests.builders import tiny_llama, token_batches
from tests.merging.planning import assert_same, weights_of

# Beside the checkout, no part of the package.
TEXT = Path(__file__).resolve().parents[2].parent / "shared/data/eval/wikitext2_tokens_valid.txt"


def _batches(number: int, seed: int) -> list[Batch]:
    return [{"input_ids": ids} for ids in token_batches(number, 1, 24, seed=seed)]


CALIBRATION, EVALUATION = _batches(6, 0), _batches(4, 1)


@pytest.mark.parametrize(
    "name",
    [
        "bi-drop",
        "bi-concat-ridge",
        "block-first-magnitude",
        "greedy-joint-merged",
        "come-joint-ridge",
        "comep-average",
        "come-published-mlp",
        "search-drop-mlp",
    ],
)
def test_measuring_gives_the_figures_of_collapse(name: str):
    method, model = METHODS[name], tiny_llama(6)
    before = weights_of(model)
    bench = Bench(model, CALIBRATION, EVALUATION, [5, 3])
    results = {depth: bench.measure(method, depth, 1.0) for depth in (5, 3)}
    assert_same(model, before)
    for depth, result in results.items():
        student, (planner, *_) = tiny_llama(6), method.planners
        collapse(
            student, CALIBRATION, target_depth=depth, planner=planner, operator=method.operator, refit=method.refit
        )
        expected = Yardstick(CALIBRATION, EVALUATION).perplexity(student)
        assert result["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_groups_chosen_for_one_operator_are_merged_by_another():
    bench = Bench(tiny_llama(6), CALIBRATION, EVALUATION, [4])
    concat, crossed = (bench.measure(method, 4, 1.0) for method in named(["bi-concat", "bi.concat>drop"]).values())
    dropped = bench.measure(METHODS["bi-drop"], 4, 1.0)
    assert crossed["groups"] == concat["groups"]
    assert crossed["perplexity"] == dropped["perplexity"] != concat["perplexity"]


def test_a_planner_that_stops_early_gives_no_figure():
    bench = Bench(tiny_llama(6), CALIBRATION, EVALUATION, [3])
    never = replace(METHODS["laco-last"], planners=[ThresholdPlanner(threshold=1.0)])
    assert bench.measure(never, 3, 1.0) == {"perplexity": None}
    assert shown({"perplexity": None}) == "-"


def test_what_a_file_holds_is_not_measured_again(tmp_path: Path):
    file, settings = tmp_path / "results.jsonl", {"dtype": "float32"}
    methods = named(["bi-drop", "search-first*"])
    bench = Bench(tiny_llama(6), CALIBRATION, EVALUATION, [5, 4], first := Results(file, settings))
    measure_all(methods, [5, 4], first, lambda: bench)
    again = Results(file, settings)
    measure_all(methods, [5, 4], again, lambda: pytest.fail("nothing is missing"))
    assert [again.get(cell(name, one, 4)) for name, one in methods.items()] == [
        first.get(cell(name, one, 4)) for name, one in methods.items()
    ]
    assert Results(file, {"dtype": "bfloat16"}).get("dense") is None


def test_grids_hold_the_ratios_of_every_planner_by_operator_and_refit():
    row = {27: {"perplexity": 37.3, "ratio": 1.2123}, 24: {"perplexity": 1e6, "ratio": 32500.0}}
    found = {"bi-drop": row | {22: {"perplexity": None}}, "bi-drop-ridge": {27: row[27]}, "come-concat": row}
    assert grids(found, [27, 24, 22], ["bi", "block", "come"], ["drop", "concat"], ["", "-mlp", "-ridge"]) == (
        "| `bi` | no refit | `mlp` | `ridge` |\n| --- | --- | --- | --- |\n"
        "| `drop` | 1.21 32,500 - |  | 1.21 ? ? |\n\n"
        "| `come` | no refit | `mlp` | `ridge` |\n| --- | --- | --- | --- |\n"
        "| `concat` | 1.21 32,500 ? |  |  |"
    )


def test_patterns_mean_crossed_methods_only_if_they_say_so():
    assert "bi-concat-ridge" in named(["*-ridge"])
    assert not any(">" in name for name in named(["*"]))
    assert list(named(["bi.concat>*-mlp"])) == [f"bi.concat>{operator}-mlp" for operator in OPERATORS]
    with pytest.raises(InputError, match="'bi-nothing' is none"):
        named(["bi-nothing"])


@pytest.mark.model
@pytest.mark.skipif(not TEXT.is_file(), reason=f"the WikiText-2 validation text is not at {TEXT}")
def test_dropping_by_block_influence_measures_as_published_in_methods():
    model = load(DEMO, "float32")
    yardstick = Yardstick.of(TEXT.read_text(encoding="utf-8"), load_tokenizer(DEMO))
    dense = yardstick.perplexity(model)
    results = yardstick.measure(model, METHODS["bi-drop"], [27, 24], dense)
    assert [results[depth]["removed"] for depth in (27, 24)] == [[25, 13, 14], [25, 13, 14, 12, 26, 17]]
    measured = [dense, *(results[depth]["perplexity"] for depth in (27, 24))]
    assert measured == pytest.approx([30.8, 45.9, 66.9], rel=0.005)
