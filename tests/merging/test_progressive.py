"""CoMe's planner against one that scores the merged model from scratch."""

import copy
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from math import exp, nan

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.collapse import plan
from lcprune.merging.concat import Concat
from lcprune.merging.criteria import AngularDistance, BlockInfluence
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, Rdsc, ReplaceWithLast, WeightedAverage, spec_of
from lcprune.merging.progressive import ProgressivePlanner, shares_of
from lcprune.merging.remeasure import Trail
from tests.builders import FAMILIES, Family, tiny_llama
from tests.marks import slow
from tests.merging.activities import loss_of, masked, measuring
from tests.merging.planning import Breaking, assert_same, groups_of, layers_of, make_fragile, plain, weights_of

OPERATORS: list[Operator] = [Drop(), Drop("last"), Rdsc(), ReplaceWithLast(), WeightedAverage(), Concat()]
LAST = AngularDistance(span=2, tokens="last")


def from_scratch(
    model: PreTrainedModel, batches: list[Batch], operator: Operator, target: int, criterion: AngularDistance
) -> list[MergeStep]:
    """CoMe without any memory: a merged copy, all of it scored anew."""
    model, steps = copy.deepcopy(model), []
    while len(layers_of(model)) > target:
        calibration = Calibration(model, batches)
        angles, influences = criterion.score(calibration), BlockInfluence().score(calibration)
        base = angles.index(min(angles))
        first, second = influences[base : base + 2]
        shares = (first / (first + second), second / (first + second))
        steps.append(MergeStep((base, base + 1), spec_of(operator), shares, {"AngularDistance": angles[base]}))
        surgery.apply(model, steps[-1], measuring(model, batches))
    return steps


def assert_same_plan(actual: Sequence[MergeStep], expected: Sequence[MergeStep]) -> None:
    assert groups_of(actual) == groups_of(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.operator == other.operator
        assert one.shares == pytest.approx(other.shares, rel=1e-4)
        assert one.scores["AngularDistance"] == pytest.approx(other.scores["AngularDistance"], rel=1e-4)


# The plan.


@pytest.mark.parametrize("seed", [0, *slow(1, 2)])
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_plan_is_that_of_scoring_everything_from_scratch(operator: Operator, seed: int):
    model = tiny_llama(9, seed=seed)
    steps = ProgressivePlanner().plan(Calibration(model, plain()), operator, 2)
    assert_same_plan(steps, from_scratch(model, plain(), operator, 2, AngularDistance(span=2)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("criterion", [AngularDistance(span=2), LAST], ids=str)
def test_plan_is_that_of_scoring_from_scratch_in_every_family_with_padding(family: Family, criterion: AngularDistance):
    model = tiny_llama(8, model_type=family)
    steps = ProgressivePlanner(criterion, glance=32).plan(Calibration(model, masked()), Concat(), 3)
    assert_same_plan(steps, from_scratch(model, masked(), Concat(), 3, criterion))


def test_layers_that_do_next_to_nothing_merge_first():
    model = tiny_llama(9)
    with torch.no_grad():
        for layer in layers_of(model)[4:7]:
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight.mul_(1e-3)
    steps = ProgressivePlanner().plan(Calibration(model, plain()), Drop(), 7)
    assert groups_of(steps) in ([(4, 5), (4, 5)], [(5, 6), (4, 5)])


def test_of_pairs_that_are_equal_the_lowest_merges():
    model = tiny_llama(5)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    steps = ProgressivePlanner().plan(Calibration(model, plain()), Drop(), 3)
    assert groups_of(steps) == [(0, 1), (0, 1)]
    for step in steps:
        assert step.scores["AngularDistance"] == pytest.approx(0, abs=1e-3)  # what is left is rounding
        assert sum(step.shares) == pytest.approx(1)


def test_drop_keeps_the_member_that_turns_the_stream_more():
    model = tiny_llama(6)
    (step,) = ProgressivePlanner().plan(Calibration(model, plain()), Drop(), 5)
    influences = [BlockInfluence().score(Calibration(model, plain()))[layer] for layer in step.group]
    kept = layers_of(model)[step.group[influences.index(max(influences))]].state_dict()
    surgery.apply(model, step)
    assert_same(layers_of(model)[step.base].state_dict(), dict(kept))


def test_pair_behind_a_merge_that_broke_the_stream_is_never_scored_as_the_safest():
    model = tiny_llama(6)
    with torch.no_grad():
        for layer in layers_of(model)[3:5]:  # so that they are chosen first
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
    make_fragile(layers_of(model)[3])
    first, second = ProgressivePlanner().plan(Calibration(model, plain()), Breaking(), 4)
    assert first.group == (3, 4)
    assert second.group in [(0, 1), (1, 2)]
    assert all(0 < share < 1 for share in second.shares)


def test_plan_of_no_merges_is_empty():
    assert ProgressivePlanner().plan(Calibration(tiny_llama(), plain()), Drop(), 6) == ()


def lose_a_channel(layer: nn.Module) -> None:
    for name, rows, columns in (("gate_proj", 63, 32), ("up_proj", 63, 32), ("down_proj", 32, 63)):
        projection = layer.get_submodule(f"mlp.{name}")
        projection.weight = nn.Parameter(projection.weight.detach()[:rows, :columns].clone())


def test_layers_that_are_built_differently_do_not_pair():
    model = tiny_llama(6)
    lose_a_channel(layers_of(model)[1])
    lose_a_channel(layers_of(model)[4])
    assert groups_of(ProgressivePlanner().plan(Calibration(model, plain()), Drop(), 1)) == [(2, 3)]


@pytest.mark.parametrize("stop", [None, 1, 2, "raise"])
@pytest.mark.parametrize("shares", ["influence", "searched"])
@pytest.mark.parametrize("operator", [Drop(), WeightedAverage(), Concat()], ids=str)
def test_model_comes_back_bit_for_bit_however_the_planning_ends(operator: Operator, shares: str, stop: object):
    model = tiny_llama(model_type="qwen2").train()
    weights, config, layers = weights_of(model), copy.deepcopy(model.config.to_dict()), list(layers_of(model))
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    planner = ProgressivePlanner(shares="searched", grid=2) if shares == "searched" else ProgressivePlanner()
    found = planner.steps(Calibration(model, plain()), operator, 2)
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
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_planning_goes_on_where_the_history_ends():
    model = tiny_llama(8)
    whole = ProgressivePlanner().plan(Calibration(model, plain()), Concat(), 3)
    surgery.apply_all(model, whole[:2], measuring(model, plain()))
    later = Calibration(model, plain(), original=tiny_llama(8), history=MergeHistory(8, whole[:2]))
    assert_same_plan(ProgressivePlanner().plan(later, Concat(), 3), whole[2:])


def test_budget_of_perplexity_follows_the_planner_step_by_step():
    model = tiny_llama(6)
    history = plan(model, plain(), max_perplexity_ratio=1e6, planner=ProgressivePlanner())
    whole = ProgressivePlanner().plan(Calibration(model, plain()), Drop(), 1)
    assert groups_of(history.steps) == groups_of(whole)[: len(history.steps)]
    assert history.steps


# Layers that are merges already.


def test_spared_layers_merge_once():
    steps = ProgressivePlanner(merged="spared").plan(Calibration(tiny_llama(9), plain()), Drop(), 5)
    history = MergeHistory(9, steps)
    assert steps
    assert max(map(len, history.lineage)) == 2


@pytest.mark.parametrize("seed", range(4))
def test_sparing_ends_where_no_pair_is_left_wherever_the_first_was(seed: int):
    """The published code raises IndexError when the last pair was merged first."""
    model = tiny_llama(6, seed=seed)
    with torch.no_grad():
        for layer in layers_of(model)[-2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    steps = ProgressivePlanner(merged="spared").plan(Calibration(model, plain()), Drop(), 1)
    history = MergeHistory(6, steps)
    assert steps[0].group == (4, 5)
    lengths = [len(ancestors) for ancestors in history.lineage]
    assert max(lengths) == 2
    assert (1, 1) not in pairwise(lengths)


def test_sparing_counts_the_merges_that_were_there_before():
    model = tiny_llama(4)
    done = (MergeStep((0, 1), spec_of(Drop()), (1.0, 0.0)), MergeStep((1, 2), spec_of(Drop()), (1.0, 0.0)))
    surgery.apply_all(model, done)
    calibration = Calibration(model, plain(), original=tiny_llama(4), history=MergeHistory(4, done))
    assert ProgressivePlanner(merged="spared").plan(calibration, Drop(), 1) == ()
    assert len(ProgressivePlanner().plan(calibration, Drop(), 1)) == 1


@pytest.mark.parametrize(("depth", "target"), [(30, 15), (9, 5), (2, 1)])
def test_sparing_can_halve_the_depth_and_no_more(depth: int, target: int):
    planner = ProgressivePlanner(merged="spared")
    planner.check(depth, target)
    with pytest.raises(InputError, match=rf"{target} of {depth} layers, target_depth={target - 1} .* merged=again"):
        planner.check(depth, target - 1)
    ProgressivePlanner().check(depth, target - 1)


# Shares.


@pytest.mark.parametrize(
    ("influences", "power", "shares"),
    [
        ([0.1, 0.3], 1.0, [0.25, 0.75]),
        ([0.1, 0.3], 0.0, [0.5, 0.5]),
        ([0.1, 0.3], 2.0, [0.1, 0.9]),
        ([0.2, 0.1], 5000.0, [1.0, 0.0]),
        ([0.0, 0.0], 1.0, [0.5, 0.5]),
        ([-1e-17, 0.2], 1.0, [0.0, 1.0]),
        ([nan, 0.2], 1.0, [0.5, 0.5]),
    ],
)
def test_shares_are_powers_of_the_influences(influences: list[float], power: float, shares: list[float]):
    assert shares_of(influences, power) == pytest.approx(shares)


@pytest.mark.parametrize("power", [0.0, 0.5, 3.0])
def test_power_reaches_the_plan(power: float):
    model = tiny_llama()
    (step,) = ProgressivePlanner(power=power).plan(Calibration(model, plain()), WeightedAverage(), 5)
    first, second = (BlockInfluence().score(Calibration(model, plain()))[layer] for layer in step.group)
    assert step.shares[0] == pytest.approx(first**power / (first**power + second**power), rel=1e-4)


@pytest.mark.parametrize("operator", [WeightedAverage(), Concat(), Drop()], ids=str)
def test_searched_share_is_the_best_by_brute_force(operator: Operator):
    model = tiny_llama(6)
    (step,) = ProgressivePlanner(shares="searched", grid=4).plan(Calibration(model, plain()), operator, 5)
    losses = {}
    for share in (0.5, 0.25, 0.75, 0.0, 1.0):
        candidate = replace(step, shares=(share, 1 - share))
        with surgery.trial(model, candidate, measure=measuring(model, plain())):
            losses[share] = loss_of(model, plain())
    best = min(losses.values())
    assert losses[step.shares[0]] == pytest.approx(best, rel=1e-5)
    assert step.scores["TrialPerplexity"] == pytest.approx(exp(best), rel=1e-4)


def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a candidate is run to its end."""
    runs: list[int] = []
    last_states = Trail.last_states

    def counting(self: Trail, base: int, states: Sequence[Tensor]) -> Iterable[Tensor]:
        runs.append(base)
        return last_states(self, base, states)

    monkeypatch.setattr(Trail, "last_states", counting)
    return runs


@pytest.mark.parametrize(
    ("operator", "outcomes"),
    [(Drop(), 2), (Drop("first"), 1), (Rdsc(), 1), (WeightedAverage(), 201), (Concat(), 65), (Concat("joint"), 1)],
    ids=str,
)
def test_shares_that_make_the_same_layer_are_tried_once(
    operator: Operator, outcomes: int, monkeypatch: pytest.MonkeyPatch
):
    """64 channels and two heads of a layer without biases: quotas know 65 ways to share them, 200 shares or not."""
    runs = tried(monkeypatch)
    planner = ProgressivePlanner(shares="searched", grid=200)
    planner.plan(Calibration(tiny_llama(3), plain()[:1]), operator, 2)
    assert len(runs) == outcomes


def test_searched_share_that_does_not_matter_is_an_even_one():
    (step,) = ProgressivePlanner(shares="searched").plan(Calibration(tiny_llama(3), plain()), Rdsc(), 2)
    assert step.shares == (0.5, 0.5)


# Mistakes.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": AngularDistance()}, r"criterion=AngularDistance\(span=1\) must have span=2"),
        ({"merged": "never"}, "merged='never' must be again or spared"),
        ({"shares": "equal"}, "shares='equal' must be influence or searched"),
        ({"power": -1.0}, "power=-1.0 must be a number from 0 on"),
        ({"power": nan}, "power=nan must be a number from 0 on"),
        ({"shares": "searched", "grid": 0}, "grid=0 must be at least 1"),
        ({"glance": 0}, "glance=0 must be at least 1, or null to score every pair on all tokens"),
        ({"shares": "searched", "power": 2.0}, "power=2.0 has no effect .* set shares=influence"),
        ({"grid": 10}, "grid=10 has no effect .* set shares=searched"),
        ({"merged": "never", "power": -1.0}, "merged='never' .*; power=-1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str):
    with pytest.raises(InputError, match=f"ProgressivePlanner: .*{message}"):
        ProgressivePlanner(**settings)  # type: ignore[arg-type]
