"""The greedy search against one that copies the model for every candidate and runs it from the start."""

import copy
from contextlib import closing
from math import exp

import pytest
import torch
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.calibration import Calibration
from lcprune.merging.concat import Concat
from lcprune.merging.criteria import AngularDistance, BlockInfluence, OutputSimilarity
from lcprune.merging.greedy import GreedyPlanner
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, Rdsc, ReplaceWithLast, WeightedAverage, spec_of
from lcprune.merging.remeasure import measure_activity
from tests.builders import FAMILIES, Family, tiny_llama, token_batches
from tests.merging.planning import (
    Breaking,
    Given,
    assert_same,
    groups_of,
    layers_of,
    make_fragile,
    plain,
    weights_of,
)

OPERATORS = [Drop(), Drop("first"), Drop("last"), Rdsc(), ReplaceWithLast(), WeightedAverage(), Concat()]


def loss_of(model: PreTrainedModel) -> float:
    ids = torch.cat(token_batches())
    with torch.no_grad():
        return model(ids, labels=ids, use_cache=False).loss.item()


def without(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """A copy that has never heard of surgery."""
    shorter = copy.deepcopy(model)
    del shorter.model.layers[layer]
    shorter.config.num_hidden_layers -= 1
    return shorter


def sleb(model: PreTrainedModel, target: int) -> tuple[list[int], list[float]]:
    """Which layers go, numbered as they stand, and the perplexity after each, by brute force."""
    gone, perplexities = [], []
    while len(model.model.layers) > target:
        tried = [without(model, layer) for layer in range(len(model.model.layers))]
        losses = [loss_of(candidate) for candidate in tried]
        gone.append(losses.index(min(losses)))
        perplexities.append(exp(min(losses)))
        model = tried[gone[-1]]
    return gone, perplexities


def gone_in(steps: tuple[MergeStep, ...]) -> list[int]:
    return [step.group[1 - step.shares.index(1.0)] for step in steps]


@pytest.mark.parametrize("seed", range(2))
def test_greedy_is_brute_force_on_five_layers(seed: int):
    model = tiny_llama(5, seed=seed)
    gone, perplexities = sleb(model, 1)
    steps = GreedyPlanner().plan(Calibration(model, plain()), Drop(), 1)
    assert gone_in(steps) == gone
    assert [step.scores["TrialPerplexity"] for step in steps] == pytest.approx(perplexities, rel=1e-4)


@pytest.mark.parametrize(
    ("operator", "family"),
    [*((operator, "llama") for operator in OPERATORS), *((WeightedAverage(), family) for family in FAMILIES[1:])],
    ids=str,
)
def test_greedy_takes_the_best_candidate_of_every_operator_in_every_family(operator: Operator, family: Family):
    model = tiny_llama(5, model_type=family)
    calibration = Calibration(model, plain())
    steps = GreedyPlanner().plan(calibration, operator, 3)
    before: list[MergeStep] = []
    for step in steps:
        measure = measuring(model)
        with surgery.trial(model, *before, measure=measure):
            losses = {}
            for lower in range(len(layers_of(model)) - 1):
                shares = step.shares if lower == step.base else (0.5, 0.5)
                if operator == Drop():
                    shares = (1.0, 0.0)
                if isinstance(operator, Concat):
                    influence = BlockInfluence().score(Calibration(model, plain()))[lower : lower + 2]
                    shares = tuple(one / sum(influence) for one in influence)
                with surgery.trial(model, MergeStep((lower, lower + 1), spec_of(operator), shares), measure=measure):
                    losses[lower] = loss_of(model)
            if operator == Drop():
                with surgery.trial(model, MergeStep((0, 1), spec_of(operator), (0.0, 1.0))):
                    losses[0] = min(losses[0], loss_of(model))
        assert step.base == min(losses, key=losses.__getitem__)
        assert step.scores["TrialPerplexity"] == pytest.approx(exp(losses[step.base]), rel=1e-4)
        before.append(step)


def measuring(model: PreTrainedModel):  # type: ignore[no-untyped-def]
    return lambda wanted: measure_activity(model, plain(), wanted)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_plan_executed_reaches_the_target(operator: Operator):
    model = tiny_llama()
    steps = GreedyPlanner().plan(Calibration(model, plain()), operator, 2)
    surgery.apply_all(model, steps, measuring(model))
    assert len(layers_of(model)) == 2
    assert all(step.operator == spec_of(operator) for step in steps)
    assert {"TrialPerplexity", "weight_cosine"} <= set(steps[0].scores)


def test_plan_of_no_merges_is_empty():
    assert GreedyPlanner().plan(Calibration(tiny_llama(), plain()), Drop(), 6) == ()


def test_only_the_safest_candidates_are_tried():
    calibration = Calibration(tiny_llama(), plain())
    for layer in range(6):
        scores = [9.0] * 6
        scores[layer] = 1.0
        steps = GreedyPlanner(candidates=1, criterion=Given(tuple(scores))).plan(calibration, Drop(), 5)
        assert gone_in(steps) == [layer]


def test_a_pair_is_as_safe_as_the_safer_of_its_layers():
    calibration = Calibration(tiny_llama(), plain())
    steps = GreedyPlanner(candidates=1, criterion=Given((5, 5, 4, 1, 5, 2))).plan(calibration, Rdsc(), 5)
    assert groups_of(steps) == [(2, 3)]
    steps = GreedyPlanner(candidates=3, criterion=Given((5, 5, 4, 1, 5, 2))).plan(calibration, Rdsc(), 5)
    assert groups_of(steps)[0] in [(2, 3), (3, 4), (4, 5)]


def test_candidates_are_chosen_afresh_on_the_model_as_it_stands():
    model = tiny_llama()
    planner = GreedyPlanner(candidates=1, criterion=BlockInfluence())
    first, second = gone_in(planner.plan(Calibration(model, plain()), Drop(), 4))
    scores = BlockInfluence().score(Calibration(model, plain()))
    assert first == scores.index(min(scores))
    shorter = without(model, first)
    scores = BlockInfluence().score(Calibration(shorter, plain()))
    assert second == scores.index(min(scores))


def test_criterion_that_compares_with_the_original_sees_the_original_at_every_stage():
    model = tiny_llama()
    planner = GreedyPlanner(candidates=1, criterion=OutputSimilarity())
    first, second = gone_in(planner.plan(Calibration(model, plain()), Drop(), 4))
    scores = OutputSimilarity().score(Calibration(without(model, first), plain(), original=model))
    assert second == scores.index(min(scores))


def test_as_many_candidates_as_there_are_is_no_choice():
    calibration = Calibration(tiny_llama(), plain())
    assert GreedyPlanner(candidates=6).plan(calibration, Drop(), 3) == GreedyPlanner().plan(calibration, Drop(), 3)


@pytest.mark.parametrize("stop", [None, 1, 2, "raise"])
@pytest.mark.parametrize("operator", [Drop(), WeightedAverage(), Concat()], ids=str)
def test_model_comes_back_bit_for_bit_however_the_search_ends(operator: Operator, stop: object):
    model = tiny_llama(model_type="qwen2").train()
    weights, config, layers = weights_of(model), copy.deepcopy(model.config.to_dict()), list(layers_of(model))
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    found = GreedyPlanner().steps(Calibration(model, plain()), operator, 2)
    with pytest.raises(ArithmeticError) if stop == "raise" else closing(found), closing(found):
        for number, _ in enumerate(found, 1):
            assert len(layers_of(model)) == 6 - number
            if number == stop:
                break
            if stop == "raise":
                raise ArithmeticError
    assert_same(model, weights)
    assert model.config.to_dict() == config
    assert list(layers_of(model)) == layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(6))
    assert [parameter.data_ptr() for parameter in model.parameters()] == storage
    assert all(module.training for module in model.modules())


def test_after_every_step_the_model_is_the_one_that_was_measured():
    model = tiny_llama()
    with closing(GreedyPlanner().steps(Calibration(model, plain()), Drop(), 2)) as found:
        for step in found:
            assert exp(loss_of(model)) == pytest.approx(step.scores["TrialPerplexity"], rel=1e-4)


def test_search_goes_on_where_the_history_ends():
    model = tiny_llama()
    whole = GreedyPlanner().plan(Calibration(model, plain()), Drop(), 3)
    surgery.apply(model, whole[0])
    later = Calibration(model, plain(), original=tiny_llama(), history=MergeHistory(6, whole[:1]))
    assert gone_in(GreedyPlanner().plan(later, Drop(), 3)) == gone_in(whole[1:])


def test_merge_that_breaks_the_model_is_never_chosen_while_there_is_another():
    model = tiny_llama()
    make_fragile(layers_of(model)[0])  # of the merges that are tried first
    steps = GreedyPlanner().plan(Calibration(model, plain()), Breaking(), 3)
    assert (0,) in MergeHistory(6, steps).lineage


def test_layer_that_breaks_the_model_is_refused():
    model = tiny_llama()
    with torch.no_grad():
        layers_of(model)[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="behind layer 2 is no number in float32: the model is broken"):
        GreedyPlanner().plan(Calibration(model, plain()), Drop(), 5)


@pytest.mark.parametrize("candidates", [0, -1])
def test_candidates_below_one_are_refused(candidates: int):
    with pytest.raises(InputError, match=f"candidates={candidates} of GreedyPlanner must be at least 1"):
        GreedyPlanner(candidates)


def test_criterion_of_spans_is_refused():
    planner = GreedyPlanner(candidates=2, criterion=AngularDistance(span=2))
    with pytest.raises(InputError, match="span"):
        planner.plan(Calibration(tiny_llama(), plain()), Drop(), 4)
