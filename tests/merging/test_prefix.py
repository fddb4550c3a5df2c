"""The stream kept before layers: whatever runs from there is the model's own forward pass."""

import pytest
import torch

from lcprune.merging import prefix, surgery
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.criteria import Criterion, TrialPerplexity
from lcprune.merging.gradients import Taylor
from lcprune.merging.greedy import GreedyPlanner
from lcprune.merging.lineage import MergeStep
from lcprune.merging.operators import Drop
from lcprune.merging.planners import Planner, ThresholdPlanner
from lcprune.merging.prefix import PrefixCache, affordable
from tests.builders import FAMILIES, Family, tiny_llama
from tests.merging.planning import last_states, masked, plain

DROP_FIRST = {"class_path": "Drop", "init_args": {"keep": "first"}}


@pytest.mark.parametrize("batches", [plain(), masked()], ids=["plain", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_run_is_the_full_forward_pass_from_every_start(family: Family, batches: list[Batch]):
    model = tiny_llama(model_type=family)
    cache, expected = PrefixCache(model, batches, highest=5), last_states(model, batches)
    for start in range(6):
        torch.testing.assert_close(list(cache.run(start)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_run_past_a_layer_is_the_model_without_it(family: Family):
    model, batches = tiny_llama(model_type=family), masked()
    cache = PrefixCache(model, batches, highest=5)
    for gone in range(1, 6):
        with surgery.trial(model, MergeStep((gone - 1, gone), DROP_FIRST, (1.0, 0.0))):
            expected = last_states(model, batches)
        torch.testing.assert_close(list(cache.run(gone + 1, entry=gone)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_run_inside_a_trial_is_the_tried_models_forward_pass(family: Family):
    model = tiny_llama(model_type=family)
    cache = PrefixCache(model, masked(), highest=2)
    # A merge further up moves the numbers of the layers behind it, not their masks.
    with surgery.trial(model, MergeStep((2, 3, 4), {"class_path": "Rdsc"}, (0.2, 0.3, 0.5))):
        torch.testing.assert_close(list(cache.run(2)), last_states(model, masked()), rtol=0, atol=0)


@pytest.mark.parametrize("every", [2, 3, 4])
def test_prefix_kept_before_every_so_manieth_layer_gives_the_same_from_every_start(every: int):
    model, batches = tiny_llama(), masked()
    cache, expected = PrefixCache(model, batches, 5, every), last_states(model, batches)
    for start in (5, 4, 3, 2, 1, 0):
        torch.testing.assert_close(list(cache.run(start)), expected, rtol=0, atol=0)
        cache.forget_from(start + 1)
        torch.testing.assert_close(list(cache.run(start)), expected, rtol=0, atol=0)
    cache = PrefixCache(model, batches, 5, every)
    with surgery.trial(model, MergeStep((2, 3), DROP_FIRST, (1.0, 0.0))):
        cache.refresh(2)
        for start in range(5):
            torch.testing.assert_close(list(cache.run(start)), last_states(model, batches), rtol=0, atol=0)


def test_what_is_kept_takes_no_more_than_the_weights():
    model = tiny_llama(6)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    tokens = weights // (32 * 4)  # a stream of so many tokens is as large as the model
    for length, every in ((tokens // 6, 1), (tokens // 6 + 1, 2), (tokens // 2, 3), (tokens, 6), (2 * tokens, 12)):
        batches = [{"input_ids": torch.zeros(1, length, dtype=torch.long)}]
        assert affordable(model, batches, highest=5) == every


@pytest.mark.parametrize("planner", [GreedyPlanner(), ThresholdPlanner(layers_per_merge=2, threshold=-1.0)], ids=str)
def test_plans_are_the_same_where_there_is_room_for_the_embeddings_alone(
    monkeypatch: pytest.MonkeyPatch, planner: Planner
):
    calibrations = [Calibration(tiny_llama(6), masked()) for _ in range(2)]
    expected = planner.plan(calibrations[0], Drop(), 3)
    monkeypatch.setattr(prefix, "ROOM", 1e-6)
    assert planner.plan(calibrations[1], Drop(), 3) == expected


@pytest.mark.parametrize("criterion", [TrialPerplexity(), Taylor()], ids=repr)
def test_scores_are_the_same_where_there_is_room_for_the_embeddings_alone(
    monkeypatch: pytest.MonkeyPatch, criterion: Criterion
):
    expected = criterion.score(Calibration(tiny_llama(6), masked()))
    monkeypatch.setattr(prefix, "ROOM", 1e-6)
    assert criterion.score(Calibration(tiny_llama(6), masked())) == expected


def test_prefix_cache_keeps_no_state_above_the_highest():
    cache = PrefixCache(tiny_llama(), plain(), highest=2)
    with pytest.raises(IndexError):
        next(cache.run(3))


def test_forgotten_states_are_gone_and_the_others_stay():
    model = tiny_llama()
    cache = PrefixCache(model, plain(), highest=5)
    cache.forget_from(3)
    with pytest.raises(IndexError):
        next(cache.run(3))
    torch.testing.assert_close(list(cache.run(2)), last_states(model, plain()), rtol=0, atol=0)
