"""Which layers go: every planner against a naive account of what its paper says."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import nan
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lcprune.errors import InputError
from lcprune.merging import collapse, surgery
from lcprune.merging.calibration import Calibration, LayerStats
from lcprune.merging.concat import Concat
from lcprune.merging.criteria import AngularDistance, BlockInfluence, OutputSimilarity, TrialPerplexity
from lcprune.merging.greedy import GreedyPlanner
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, Rdsc, ReplaceWithLast, WeightedAverage, spec_of
from lcprune.merging.planners import (
    ContiguousBlock,
    FixedPlan,
    OneShotRanking,
    Planner,
    ThresholdPlanner,
    with_weight_cosines,
)
from lcprune.merging.progressive import ProgressivePlanner
from lcprune.merging.search import RefitSearch
from tests.builders import FAMILIES, Family, tiny_llama, token_batches
from tests.merging.planning import Given, assert_same, groups_of, layers_of, overflowing, plain, weights_of

INF = float("inf")


# --- OneShotRanking


@pytest.mark.parametrize(
    ("scores", "target", "survivors"),
    [
        ((6, 5, 4, 3, 2, 1), 5, [0, 1, 2, 3, 4]),
        ((1, 2, 3, 4, 5, 6), 5, [1, 2, 3, 4, 5]),
        ((1, 2, 3, 4, 5, 6), 2, [4, 5]),
        ((1, 2, 3, 4, 5, 6), 1, [5]),
        ((6, 1, 5, 2, 4, 3), 3, [0, 2, 4]),
        ((6, 1, 2, 5, 4, 3), 4, [0, 3, 4, 5]),
        ((6, 5, 1, 2, 3, 4), 2, [0, 1]),
        ((1, 6, 5, 2, 3, 4), 3, [1, 2, 5]),
        ((1, 6, 2, 5, 3, 4), 3, [1, 3, 5]),
        ((2, 1, 6, 3, 5, 4), 3, [2, 4, 5]),
        # Among equals the lower layer goes.
        ((6, 5, 5, 5, 5, 6), 4, [0, 3, 4, 5]),
        ((6, INF, INF, 1, INF, 2), 4, [0, 1, 2, 4]),
    ],
)
def test_one_shot_ranking_with_drop_keeps_the_survivors_and_nothing_else(
    scores: tuple[float, ...], target: int, survivors: list[int]
):
    model = tiny_llama()
    original = [weights_of(layer) for layer in layers_of(model)]
    steps = OneShotRanking(Given(scores)).plan(Calibration(model, plain()), Drop(), target)
    surgery.apply_all(model, steps)
    assert len(layers_of(model)) == len(survivors)
    for layer, survivor in zip(layers_of(model), survivors, strict=True):
        assert_same(layer, original[survivor])


# Shares in proportion to such scores would not single out the survivor, which is not the first of its group here.
@pytest.mark.parametrize(
    "scores",
    [(5, 5, 6, 6, 6, 6), (5, INF, INF, INF, INF, INF), (-5, -4, -3, -3, -3, -3)],
    ids=["tie", "inf", "negative"],
)
def test_one_shot_ranking_keeps_the_layer_after_the_first_when_the_first_goes(scores: tuple[float, ...]):
    model = tiny_llama()
    second = weights_of(layers_of(model)[1])
    surgery.apply_all(model, OneShotRanking(Given(scores)).plan(Calibration(model, plain()), Drop(), 5))
    assert_same(layers_of(model)[0], second)


def test_one_shot_ranking_removes_a_layer_without_a_score_last():
    scores = (nan, 1.0, nan, 3.0, 2.0, 4.0)
    steps = OneShotRanking(Given(scores)).plan(Calibration(tiny_llama(), plain()), Drop(), 2)
    assert MergeHistory(6, steps).lineage == ((0, 1), (2, 3, 4, 5))


def test_one_shot_ranking_does_not_remove_a_layer_without_a_score():
    scores = (nan, 1.0, nan, 3.0, 2.0, INF)
    with pytest.raises(InputError, match=r"criterion=Given\(.* gives layer 0 no number \(NaN\), and target_depth=1"):
        OneShotRanking(Given(scores)).plan(Calibration(tiny_llama(), plain()), Drop(), 1)


@pytest.mark.parametrize("planner", [OneShotRanking, partial(GreedyPlanner, 3)], ids=["ranking", "greedy"])
@pytest.mark.parametrize("kind", [torch.tensor, np.float32, lambda scores: [torch.tensor(score) for score in scores]])
def test_scores_of_other_libraries_plan_what_floats_do(planner: Callable[..., Planner], kind: Callable[..., Any]):
    scores = (5.0, 1.0, 6.0, 3.0, 2.0, 4.0)
    plans = [
        planner(criterion=Given(given)).plan(Calibration(tiny_llama(), plain()), Concat(), 5)
        for given in (scores, kind(scores))
    ]
    assert plans[0] == plans[1]
    assert MergeHistory.from_json(MergeHistory(6, plans[1]).to_json()).steps == plans[1]


@pytest.mark.parametrize("scores", [None, (None,) * 6, torch.ones(6, 2), 3.0, ("high",) * 6])
def test_scores_that_are_no_numbers_name_their_criterion(scores: object):
    with pytest.raises(InputError, match=r"(?s)criterion=Given\(.* is not one number for every layer"):
        OneShotRanking(Given(scores)).plan(Calibration(tiny_llama(), plain()), Drop(), 4)  # type: ignore[arg-type]


def test_fixed_plan_takes_what_a_plan_hands_out():
    plan = collapse.plan(tiny_llama(), plain(), target_depth=4)
    again = FixedPlan([group for group in plan.lineage if len(group) > 1])  # type: ignore[misc]
    assert collapse.plan(tiny_llama(), plain(), target_depth=4, planner=again).lineage == plan.lineage
    assert FixedPlan([np.array([1, 2])]) == FixedPlan(((1, 2),)) == FixedPlan([[1, 2]])  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize("groups", [3, "1, 2", [1, 2], [["1", "2"]], [[1.5, 2.5]], None])
def test_groups_that_are_no_layer_numbers_are_refused(groups: object):
    with pytest.raises(InputError, match=r"groups=.* must be (layer numbers like|a list of groups)"):
        FixedPlan(groups)  # type: ignore[arg-type]


def test_contiguous_block_without_a_score_is_not_chosen(monkeypatch: pytest.MonkeyPatch):
    stats = LayerStats({2: (0.0,) * 5}, {2: (0.1, nan, 0.3, 0.2, nan)}, 1)
    monkeypatch.setattr("lcprune.merging.calibration.collect", lambda *_: stats)
    (step,) = ContiguousBlock().plan(Calibration(tiny_llama(), plain()), Drop(keep="first"), 4)
    assert step.group == (2, 3, 4)


@pytest.mark.parametrize("ratio", [None, 1.5])
@pytest.mark.parametrize(
    "planner",
    [
        OneShotRanking(),
        OneShotRanking(TrialPerplexity()),
        ContiguousBlock(),
        ThresholdPlanner(layers_per_merge=2),
        GreedyPlanner(),
        ProgressivePlanner(),
        RefitSearch(),
    ],
    ids=lambda planner: type(planner).__name__,
)
def test_no_plan_is_made_of_a_stream_that_is_no_number(planner: Planner, ratio: float | None):
    depth = 4 if ratio is None else None
    with pytest.raises(
        InputError, match=r"behind layer 2 is no number in float16: choose bfloat16 or float32, .*dtype"
    ):
        collapse.plan(overflowing(), plain(), target_depth=depth, max_perplexity_ratio=ratio, planner=planner)


def test_one_shot_ranking_removes_a_layer_into_the_one_before_it():
    calibration = Calibration(tiny_llama(), plain())
    steps = OneShotRanking(Given((6, 1, 5, 2, 3, 4))).plan(calibration, Drop(), 3)
    assert MergeHistory(6, steps).lineage == ((0, 1), (2, 3, 4), (5,))


def test_one_shot_ranking_judges_by_its_criterion():
    model = tiny_llama()
    scores = TrialPerplexity().score(Calibration(model, plain()))
    lowest = sorted(range(1, 6), key=lambda layer: scores[layer])[0]
    if scores[0] < scores[lowest]:
        lowest = 0
    steps = OneShotRanking(TrialPerplexity()).plan(Calibration(model, plain()), Drop(), 5)
    assert groups_of(steps) == [(lowest - 1, lowest) if lowest else (0, 1)]
    assert steps[0].scores["TrialPerplexity"] == pytest.approx(scores[lowest])


def test_one_shot_ranking_notes_the_worst_score_that_went():
    calibration = Calibration(tiny_llama(), plain())
    steps = OneShotRanking(Given((6, 1, 2, 7, 8, 9))).plan(calibration, Drop(), 4)
    assert steps[0].scores["Given"] == 2


def test_one_shot_ranking_shares_are_in_proportion_to_the_scores():
    calibration = Calibration(tiny_llama(), plain())
    steps = OneShotRanking(Given((6, 1, 3, 8, 8, 8))).plan(calibration, WeightedAverage(), 4)
    assert steps[0].shares == pytest.approx((0.6, 0.1, 0.3))


def test_one_shot_ranking_refuses_a_criterion_that_does_not_score_single_layers():
    calibration = Calibration(tiny_llama(), plain())
    with pytest.raises(InputError, match="span"):
        OneShotRanking(AngularDistance(span=2)).plan(calibration, Drop(), 2)


# The spared layer scores lowest and the base of a group that scores higher: it stays all the same.
@pytest.mark.parametrize(
    ("first", "last", "target", "survivors"),
    [(2, 0, 5, [0, 1, 3, 4, 5]), (2, 0, 3, [0, 1, 5]), (0, 2, 4, [2, 3, 4, 5]), (2, 2, 4, [0, 1, 4, 5])],
)
def test_one_shot_ranking_spares_layers_at_both_ends(first: int, last: int, target: int, survivors: list[int]):
    model = tiny_llama()
    original = [weights_of(layer) for layer in layers_of(model)]
    planner = OneShotRanking(Given((1, 2, 3, 4, 5, 6)), spare_first=first, spare_last=last)
    planner.check(6, target)
    surgery.apply_all(model, planner.plan(Calibration(model, plain()), Drop(), target))
    for layer, survivor in zip(layers_of(model), survivors, strict=True):
        assert_same(layer, original[survivor])


@pytest.mark.parametrize("target", [1, 5])
def test_one_shot_ranking_refuses_a_target_below_what_it_spares(target: int):
    with pytest.raises(InputError, match=f"keep 6 of 8 layers, target_depth={target} asks for fewer"):
        OneShotRanking(spare_first=4, spare_last=2).check(8, target)


@pytest.mark.parametrize("settings", [{"spare_first": -1}, {"spare_last": -1}])
def test_one_shot_ranking_refuses_to_spare_less_than_nothing(settings: dict[str, int]):
    with pytest.raises(InputError, match="must be 0 or more"):
        OneShotRanking(**settings)  # type: ignore[arg-type]


# --- ContiguousBlock


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", [1, 2, 3, 4, 5])
def test_contiguous_block_has_the_least_angle_of_all(target: int, family: Family):
    model = tiny_llama(model_type=family)
    n = 6 - target
    before_norm: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    with torch.no_grad():
        states = [*model(torch.cat(token_batches()), output_hidden_states=True).hidden_states[:-1], before_norm[0]]
    handle.remove()
    angles = {s: cosine_similarity(states[s], states[s + n], dim=-1).arccos().mean().item() for s in range(1, 7 - n)}
    start = min(angles, key=angles.__getitem__)
    (step,) = ContiguousBlock().plan(Calibration(model, plain()), Drop(keep="first"), target)
    assert step.group == tuple(range(start - 1, start + n))
    assert step.scores["AngularDistance"] == pytest.approx(angles[start] / torch.pi, abs=1e-6)


def test_contiguous_block_with_drop_first_keeps_the_layers_around_the_block():
    model = tiny_llama()
    original = [weights_of(layer) for layer in layers_of(model)]
    (step,) = ContiguousBlock().plan(Calibration(model, plain()), Drop(keep="first"), 4)
    surgery.apply(model, step)
    survivors = [layer for layer in range(6) if layer not in step.group[1:]]
    for layer, survivor in zip(layers_of(model), survivors, strict=True):
        assert_same(layer, original[survivor])


@pytest.mark.parametrize("target", [0, 6, 7])
def test_contiguous_block_refuses_targets_that_leave_no_block(target: int):
    with pytest.raises(InputError, match=f"target_depth={target} must lie between 1 and 5"):
        ContiguousBlock().check(6, target)


# --- FixedPlan


def test_fixed_plan_merges_the_groups_as_the_teachers_layers_are_numbered():
    steps = FixedPlan([[1, 2], [4, 5]]).plan(Calibration(tiny_llama(), plain()), Drop(), 4)
    assert groups_of(steps) == [(1, 2), (3, 4)]
    assert MergeHistory(6, steps).lineage == ((0,), (1, 2), (3,), (4, 5))


def test_fixed_plan_does_not_pass_the_target():
    steps = FixedPlan([[4, 5], [1, 2]]).plan(Calibration(tiny_llama(), plain()), Drop(), 5)
    assert groups_of(steps) == [(4, 5)]


def test_fixed_plan_goes_on_where_the_history_ends():
    history = MergeHistory(6, FixedPlan([[1, 2]]).plan(Calibration(tiny_llama(), plain()), Drop(), 5))
    later = Calibration(tiny_llama(n_layers=5), plain(), history=history)
    steps = FixedPlan([[1, 2], [4, 5]]).plan(later, Drop(), 4)
    assert groups_of(steps) == [(3, 4)]
    assert history.extend(steps).lineage == ((0,), (1, 2), (3,), (4, 5))


def test_fixed_plan_finishes_a_group_that_is_merged_in_part():
    history = MergeHistory(6, FixedPlan([[2, 3]]).plan(Calibration(tiny_llama(), plain()), Drop(), 5))
    later = Calibration(tiny_llama(n_layers=5), plain(), history=history)
    steps = FixedPlan([[1, 2, 3, 4]]).plan(later, Drop(), 3)
    assert history.extend(steps).lineage == ((0,), (1, 2, 3, 4), (5,))


@pytest.mark.parametrize("target", [5, 4, 3, 2])
def test_fixed_plan_foresees_what_it_plans(target: int):
    planner = FixedPlan([[4, 5], [0, 1, 2, 3]] if target == 2 else [[4, 5], [0, 1, 2]])
    history = MergeHistory(6, planner.plan(Calibration(tiny_llama(), plain()), Drop(), target))
    assert planner.foresee(MergeHistory(6).lineage, target) == history.lineage
    assert planner.foresee(history.lineage, target) == history.lineage


def test_planner_that_looks_at_the_model_foresees_nothing():
    assert OneShotRanking().foresee(MergeHistory(6).lineage, 4) is None


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "must name at least one group and no layer twice"),
        ([[1, 2], [2, 3]], "no layer twice"),
        ([[1]], r"groups: \[1\] must be two or more consecutive"),
        ([[1, 3]], r"groups: \[1, 3\] must be two or more consecutive"),
        ([[-1, 0]], r"groups: \[-1, 0\] must be two or more consecutive"),
        ([[]], r"groups: \[\] must be two or more consecutive"),
    ],
)
def test_fixed_plan_refuses_groups_that_are_no_disjoint_runs(groups: list[list[int]], words: str):
    with pytest.raises(InputError, match=words):
        FixedPlan(groups)


def test_fixed_plan_refuses_layers_that_do_not_exist():
    with pytest.raises(InputError, match="layer 6 does not exist, the model has layers 0 to 5"):
        FixedPlan([[5, 6]]).check(6, 5)


def test_fixed_plan_refuses_too_few_groups_for_the_target():
    with pytest.raises(InputError, match="leave 5 layers, more than the target depth 4"):
        FixedPlan([[1, 2]]).check(6, 4)


# --- every planner

PLANNERS: tuple[Planner, ...] = (
    FixedPlan([[0, 1], [2, 3, 4]]),
    OneShotRanking(),
    OneShotRanking(OutputSimilarity()),
    OneShotRanking(TrialPerplexity()),
    OneShotRanking(AngularDistance()),
    ContiguousBlock(),
    ThresholdPlanner(3, threshold=-1.0, lowest=0),
)


@pytest.mark.parametrize("operator", [Drop(), Rdsc(), ReplaceWithLast(), WeightedAverage()], ids=str)
@pytest.mark.parametrize("planner", PLANNERS, ids=str)
def test_plan_executed_reaches_the_target_with_the_operator_given(planner: Planner, operator: Operator):
    model = tiny_llama()
    planner.check(6, 3)
    steps = planner.plan(Calibration(model, plain()), operator, 3)
    surgery.apply_all(model, steps)
    assert len(layers_of(model)) == 3
    assert all(step.operator == spec_of(operator) for step in steps)


@pytest.mark.parametrize("planner", [*PLANNERS, ThresholdPlanner(2, threshold=0.8)], ids=str)
def test_planning_leaves_the_model_bit_for_bit(planner: Planner):
    model = tiny_llama(model_type="qwen2").train()
    weights, config, layers = weights_of(model), copy.deepcopy(model.config.to_dict()), list(layers_of(model))
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    planner.plan(Calibration(model, plain()), WeightedAverage(), 3)
    assert_same(model, weights)
    assert model.config.to_dict() == config
    assert list(layers_of(model)) == layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(6))
    assert [parameter.data_ptr() for parameter in model.parameters()] == storage
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("planner", PLANNERS, ids=str)
def test_plan_of_no_merges_is_empty(planner: Planner):
    assert planner.plan(Calibration(tiny_llama(), plain()), Drop(), 6) == ()


def test_weight_cosine_of_equal_neighbours_is_one():
    model = tiny_llama()
    layers_of(model)[2].load_state_dict(layers_of(model)[1].state_dict())
    (step,) = FixedPlan([[1, 2]]).plan(Calibration(model, plain()), Drop(), 5)
    assert step.scores["weight_cosine"] == pytest.approx(1)


def test_weight_cosine_is_the_mean_over_matrices_and_neighbours_of_the_layers_named():
    model = tiny_llama()
    steps = FixedPlan([[0, 1], [3, 4, 5]]).plan(Calibration(model, plain()), Drop(), 3)
    matrices = [[p for p in layer.parameters() if p.dim() == 2] for layer in layers_of(model)]
    cosines = [
        cosine_similarity(left.flatten(), right.flatten(), dim=0).item()
        for a, b in pairwise((3, 4, 5))
        for left, right in zip(matrices[a], matrices[b], strict=True)
    ]
    assert len(cosines) == 14
    assert steps[1].scores["weight_cosine"] == pytest.approx(sum(cosines) / 14)


def test_weight_cosine_of_a_second_merge_is_that_of_the_bases():
    model = tiny_llama(4)
    step = MergeStep((0, 1), spec_of(Drop("first")), (1.0, 0.0))
    _, second = with_weight_cosines(Calibration(model, plain()), [step, step])
    bases = ([p for p in layers_of(model)[index].parameters() if p.dim() == 2] for index in (0, 2))
    cosines = [
        cosine_similarity(left.flatten(), right.flatten(), dim=0).item() for left, right in zip(*bases, strict=True)
    ]
    assert second.scores["weight_cosine"] == pytest.approx(sum(cosines) / 7)


def test_default_criterion_of_one_shot_ranking_is_block_influence():
    assert OneShotRanking() == OneShotRanking(BlockInfluence())
