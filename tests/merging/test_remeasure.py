"""The trail gives what whole passes give, and runs only the layers that a merge has changed."""

import pytest

from lcprune.merging import remeasure, surgery
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.collapse import collapse, execute
from lcprune.merging.concat import Concat
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, WeightedAverage, spec_of
from lcprune.merging.progressive import ProgressivePlanner
from lcprune.merging.remeasure import Trail, measure_activity
from tests.builders import FAMILIES, Family, tiny_llama
from tests.merging.activities import assert_close, masked, measuring, passes, seen
from tests.merging.planning import assert_same, layers_of, plain


@pytest.mark.parametrize("batches", [plain(), masked()], ids=["plain", "masked"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gemma3_text", "gpt2", "phi3", "opt", "falcon"])
def test_activity_is_that_of_whole_passes_before_and_after_merges(family: Family, batches: list[Batch]):
    model = tiny_llama(7, model_type=family)
    trail = Trail(model, batches)
    for base in (5, 1, 1, 2):
        wanted = (base + 1, base)
        assert_close(trail.activity(wanted), seen(model, batches, wanted))
        assert_close(measure_activity(model, batches, wanted), seen(model, batches, wanted))
        step = MergeStep((base, base + 1), spec_of(WeightedAverage()), (0.25, 0.75))
        surgery.apply(model, step)
        trail.forget(base)
    depth = len(layers_of(model))
    assert_close(trail.activity(range(depth)), seen(model, batches, range(depth)))


def test_after_a_merge_only_what_lies_behind_it_runs_again(monkeypatch: pytest.MonkeyPatch):
    """With the three batches run as one: boundaries 0, 4, 8 are kept, and the two where the last walk began."""
    model, run = tiny_llama(10), passes(monkeypatch)
    trail = Trail(model, plain())
    for _ in trail.walk(0, 10):
        pass
    assert run == list(range(10))
    for expected in ([4, 5, 6, 7, 8], [5, 6, 7], [5, 6]):
        run.clear()
        surgery.apply(model, MergeStep((6, 7), spec_of(Drop()), (1.0, 0.0)))
        trail.forget(6)
        depth = len(layers_of(model))
        for _ in trail.walk(5, depth):
            pass
        assert run == expected


def test_planner_runs_the_layers_behind_a_merge_and_at_most_four_before_them(monkeypatch: pytest.MonkeyPatch):
    model, run = tiny_llama(12), passes(monkeypatch)
    steps = ProgressivePlanner().plan(Calibration(model, plain()), Concat(), 8)
    behind = sum(12 - number - step.base for number, step in enumerate(steps[:-1], 1))
    assert 12 + behind <= len(run) <= 12 + behind + 4 * len(steps[:-1])


def test_trail_keeps_the_stream_at_few_boundaries():
    model = tiny_llama(12)
    trail = Trail(model, plain())
    for base in (9, 6, 3, 7, 1):
        for _ in trail.walk(max(0, base - 1), len(layers_of(model))):
            pass
        surgery.apply(model, MergeStep((base, base + 1), spec_of(Drop()), (1.0, 0.0)))
        trail.forget(base)
        assert len(trail._kept) <= len(layers_of(model)) // remeasure.KEPT_EVERY + 6


def test_activity_is_measured_no_further_than_the_highest_layer(monkeypatch: pytest.MonkeyPatch):
    model, run = tiny_llama(6), passes(monkeypatch)
    measure_activity(model, plain()[:1], (3, 2))
    assert run == [0, 1, 2, 3]
    run.clear()
    Trail(model, plain()).activity((3, 2))
    assert run == [0, 1, 2, 3]


def test_execution_of_a_plan_runs_only_what_it_asks_for(monkeypatch: pytest.MonkeyPatch):
    shares = (0.5, 0.5)
    steps = tuple(MergeStep((base, base + 1), spec_of(Concat()), shares) for base in (6, 3, 3, 3))
    student, by_hand = tiny_llama(9), tiny_llama(9)
    surgery.apply_all(by_hand, steps, measuring(by_hand, plain()))
    run = passes(monkeypatch)
    execute(student, MergeHistory(9, steps), plain())
    assert_same(student, by_hand)
    assert run == [*range(8), *range(5), 3, 4]


def test_plan_and_its_execution_make_the_same_model():
    model, again = tiny_llama(8), tiny_llama(8)
    history = collapse(model, plain(), target_depth=4, planner=ProgressivePlanner(), operator=Concat())
    surgery.apply_all(again, history.steps, measuring(again, plain()))
    assert_same(model, again)
