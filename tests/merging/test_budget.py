"""How short, in the user's terms: depths from shapes, and plans that keep to a perplexity."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging.budget import Budget, Depth, Parameters, PerplexityRatio, Size, feasible_depths, on_meta, one_of
from lcprune.merging.calibration import Batch, Calibration, token_loss
from lcprune.merging.collapse import collapse, execute, plan
from lcprune.merging.concat import Concat
from lcprune.merging.criteria import perplexity
from lcprune.merging.gradients import Taylor
from lcprune.merging.greedy import GreedyPlanner
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, WeightedAverage
from lcprune.merging.planners import ContiguousBlock, FixedPlan, OneShotRanking, Planner, ThresholdPlanner
from lcprune.merging.refit import MagnitudeCompensation, Refit, RidgeRefit
from lcprune.merging.search import RefitSearch
from lcprune.merging.within import MEASURED, ORIGINAL, plan_within
from tests.builders import ALL_FAMILIES, Family, tiny_config, tiny_llama, token_batches
from tests.merging.planning import assert_same, layers_of, plain, weights_of


def parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- parameters and bytes


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_parameters_of_the_meta_model_are_those_of_the_model(family: Family):
    config, model = tiny_config(model_type=family), tiny_llama(model_type=family)
    total, layer = parameters(model), sum(p.numel() for p in layers_of(model)[0].parameters())
    for depth in range(1, 6):
        exact = total - (6 - depth) * layer
        assert Parameters(exact).depth(on_meta(config)) == depth
        assert Parameters(exact + layer - 1).depth(on_meta(config)) == depth


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head_counts_once(tied: bool):
    model = tiny_llama(tied=tied)
    assert Parameters(parameters(model) - 1).depth(on_meta(tiny_config(tied=tied))) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_is_kept_by_the_file_that_is_written(dtype: torch.dtype, tmp_path: Path):
    model = tiny_llama(dtype=dtype)
    config = copy.deepcopy(model.config)
    model.save_pretrained(tmp_path / "whole")
    whole = (tmp_path / "whole" / "model.safetensors").stat().st_size
    for tenths in (4, 5, 7, 9):
        limit = whole * tenths // 10
        depth = Size(limit).depth(on_meta(config))
        assert depth == Size(limit).depth(tiny_llama(dtype=dtype))
        shorter = tiny_llama(depth, dtype=dtype)
        shorter.save_pretrained(tmp_path / str(tenths))
        assert (tmp_path / str(tenths) / "model.safetensors").stat().st_size <= limit


def test_meta_model_leaves_its_config_alone():
    config = tiny_config()
    before = copy.deepcopy(config.to_dict())
    on_meta(config)
    assert config.to_dict() == before


def test_budget_is_kept_even_if_the_smallest_layers_go():
    model = tiny_llama()
    small = layers_of(model)[3].mlp
    del small.up_proj
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    # One layer must go, and it may be the smallest one.
    assert Parameters(parameters(model) - min(sizes)).depth(model) == 5
    assert Parameters(parameters(model) - min(sizes) - 1).depth(model) == 4


@pytest.mark.parametrize(
    ("given", "number"),
    [
        *((1000, 1000), ("1000", 1000), ("1_000", 1000), ("1K", 1000), ("1.5k", 1500), (" 2 M ", 2e6)),
        *(("1e3", 1000), ("0.25B", 25e7), ("1T", 1e12), (1.5e3, 1500)),
    ],
)
def test_parameters_are_read_with_their_units(given: int | float | str, number: float):
    model = tiny_llama(2)
    with pytest.raises(InputError) as error:
        Parameters(given).depth(model)
    assert ("no less than the model has" in str(error.value)) == (number >= parameters(model))


@pytest.mark.parametrize(
    ("given", "equal"),
    [("40KB", 40_000), ("40kb", 40_000), ("40 KiB", 40_960), ("0.04MB", 40_000), ("40000B", 40_000), (4e4, 40_000)],
)
def test_sizes_are_read_with_their_units(given: int | float | str, equal: int):
    model = tiny_llama(8, dtype=torch.bfloat16)
    assert Size(given).depth(model) == Size(equal).depth(model)


UNREAD = ("1_", "1_M", "1__0K", "1_.5M", "_1", "1e999", "1e305T", 10**400)


@pytest.mark.parametrize(
    "given", ["abc", "-5M", -5, 0, "0", "100Q", "100MB", "", "nan", "1e", "M", "1,5M", True, 0.5, *UNREAD]
)
def test_amount_of_parameters_that_means_nothing_is_refused(given: int | float | str):
    with pytest.raises(
        InputError, match=r"target_params=.* must be a number above 0.* K, M, B, T behind it, like 100M"
    ):
        Parameters(given)


@pytest.mark.parametrize("given", ["200M", "200 MBit", "-1GB", 0])
def test_size_that_means_nothing_is_refused(given: int | str):
    with pytest.raises(InputError, match=f"target_size={given} must be a number above 0.*MiB.* like 200MB"):
        Size(given)


@pytest.mark.parametrize("budget", [Parameters, Size])
def test_budget_below_the_smallest_model_says_what_would_do(budget: type[Parameters] | type[Size]):
    model = tiny_llama()
    with pytest.raises(
        InputError, match="is less than the embeddings, the head and the one layer that has to stay"
    ) as e:
        budget(10_000).depth(model)
    asked = str(e.value).partition("ask for ")[2].partition(" ")[0]
    assert budget(asked).depth(model) == 1


@pytest.mark.parametrize("budget", [Parameters("1B"), Size("1GB")], ids=str)
def test_budget_that_the_model_keeps_already_is_refused(budget: Budget):
    with pytest.raises(InputError, match=r"is no less than the model has, .*: nothing would have to go"):
        budget.depth(tiny_llama())


@pytest.mark.parametrize("target", [0, 6, -1])
def test_depth_outside_the_model_is_refused(target: int):
    with pytest.raises(InputError, match=f"target_depth={target} must lie between 1 and 5"):
        Depth(target).depth(tiny_llama())


@pytest.mark.parametrize("ratio", [1, 1.0, 0.5, -1, float("nan"), float("inf")])
def test_ratio_not_above_one_is_refused(ratio: float):
    with pytest.raises(InputError, match=f"max_perplexity_ratio={ratio} must be a number above 1"):
        PerplexityRatio(ratio)


def test_one_of_makes_the_budget_that_is_given():
    assert one_of() is None
    assert one_of(target_depth=3) == Depth(3)
    assert one_of(target_params="1M") == Parameters("1M")
    assert one_of(target_size="1MB") == Size("1MB")
    assert one_of(max_perplexity_ratio=1.5) == PerplexityRatio(1.5)
    with pytest.raises(InputError, match=r"target_depth and target_size .* give one of them"):
        one_of(target_depth=3, target_size="1MB")


def test_collapse_keeps_to_parameters_and_size():
    for budget in ({"target_params": "40K"}, {"target_size": "160KB"}):
        model = tiny_llama()
        history = collapse(model, plain(), **budget)  # type: ignore[arg-type]
        assert parameters(model) <= 40_000
        assert history.depth == len(layers_of(model)) == 3


def test_plan_needs_a_budget():
    with pytest.raises(InputError, match="How short"):
        plan(tiny_llama(), plain())


def test_planner_that_stops_above_the_budget_is_refused():
    planner = ThresholdPlanner(3, threshold=1.0)
    assert plan(tiny_llama(), plain(), target_depth=3, planner=planner).depth == 6
    with pytest.raises(InputError, match=r"takes 3 layers, and ThresholdPlanner.* stops at 6"):
        plan(tiny_llama(), plain(), target_params="40K", planner=planner)


# --- perplexity


def self_taught() -> list[Batch]:
    """Labels are what the whole model predicts: what is taken from it costs."""
    batches: list[Batch] = []
    for ids in token_batches():
        with torch.no_grad():
            predictions = tiny_llama()(ids, use_cache=False).logits.argmax(-1)
        batches.append({"input_ids": ids, "labels": torch.cat([ids[:, :1], predictions[:, :-1]], dim=1)})
    return batches


TEXT = self_taught()


def measured(model: PreTrainedModel) -> float:
    losses = []
    with torch.no_grad():
        for batch in TEXT:
            state = model.get_decoder()(batch["input_ids"], use_cache=False).last_hidden_state
            losses.append(token_loss(model, state, batch))
    return perplexity(sum(loss for loss, _ in losses), sum(count for _, count in losses))


def executed(history: MergeHistory) -> float:
    model = tiny_llama()
    execute(model, history, TEXT)
    return measured(model)


ORIGINALS = measured(tiny_llama())
KINDS: list[tuple[Planner, Operator, Refit | None]] = [
    (GreedyPlanner(), Drop(), None),
    (GreedyPlanner(candidates=2), Concat(), None),
    (GreedyPlanner(candidates=2), Drop(), MagnitudeCompensation()),
    (OneShotRanking(), Drop(), None),
    (OneShotRanking(Taylor(), spare_first=1, spare_last=1), WeightedAverage(), None),
    (OneShotRanking(), Concat(), None),
    (OneShotRanking(), Drop(), RidgeRefit(strengths=[0.1])),
    (ContiguousBlock(), Drop("first"), None),
    (RefitSearch(candidates=2), Drop("first"), RidgeRefit(strengths=[0.1])),
]


@pytest.mark.parametrize(("planner", "operator", "refit"), KINDS, ids=str)
def test_plan_keeps_to_the_ratio_and_one_layer_fewer_would_not(planner: Planner, operator: Operator, refit: Refit):
    def planned(**budget: float) -> MergeHistory:
        model = tiny_llama()
        history = plan(model, TEXT, planner=planner, operator=operator, refit=refit, **budget)  # type: ignore[arg-type]
        assert_same(model, tiny_llama())
        return history

    ratio = executed(planned(target_depth=4)) / ORIGINALS * (1 + 1e-4)
    found = planned(max_perplexity_ratio=ratio)
    assert found.depth <= 4
    figure = executed(found)
    assert figure <= ratio * ORIGINALS
    assert found.steps[-1].measured == pytest.approx({MEASURED: figure, ORIGINAL: ORIGINALS}, rel=1e-5)
    assert executed(planned(target_depth=found.depth - 1)) > ratio * ORIGINALS


@pytest.mark.parametrize("planner", [GreedyPlanner(candidates=2), OneShotRanking(), ContiguousBlock()], ids=str)
def test_where_every_layer_costs_the_depth_is_the_least_within_the_ratio(planner: Planner):
    figures = {depth: executed(plan(tiny_llama(), TEXT, target_depth=depth, planner=planner)) for depth in (5, 4, 3)}
    assert ORIGINALS < figures[5] < figures[4] < figures[3]
    for depth in (5, 4):
        ratio = (figures[depth] + figures[depth - 1]) / 2 / ORIGINALS
        assert plan(tiny_llama(), TEXT, max_perplexity_ratio=ratio, planner=planner).depth == depth


@pytest.mark.parametrize("planner", [GreedyPlanner(), OneShotRanking()], ids=str)
def test_ratio_that_no_plan_keeps_to_says_what_the_mildest_costs(planner: Planner):
    with pytest.raises(InputError, match=r"max_perplexity_ratio=1.01 .* by 1.194 \(10.64 -> 12.7\): allow more"):
        plan(tiny_llama(), TEXT, max_perplexity_ratio=1.01, planner=planner)


@pytest.mark.parametrize("planner", [GreedyPlanner(candidates=1), OneShotRanking()], ids=str)
def test_ratio_that_every_plan_keeps_to_leaves_one_layer(planner: Planner):
    assert plan(tiny_llama(), TEXT, max_perplexity_ratio=1e9, planner=planner).depth == 1


def test_spared_layers_are_the_least_that_is_tried():
    planner = OneShotRanking(spare_first=1, spare_last=2)
    assert plan(tiny_llama(), TEXT, max_perplexity_ratio=1e9, planner=planner).depth == 3


def test_threshold_that_accepts_nothing_is_a_plan_of_no_merges():
    planner = ThresholdPlanner(3, threshold=1.0)
    assert plan(tiny_llama(), TEXT, max_perplexity_ratio=2.0, planner=planner).steps == ()


def test_depths_that_the_planner_refuses_are_not_tried():
    assert feasible_depths(FixedPlan([[1, 2], [3, 4]]), 6) == [5, 4]
    assert plan(tiny_llama(), TEXT, max_perplexity_ratio=1e9, planner=FixedPlan([[1, 2], [3, 4]])).depth == 4
    with pytest.raises(InputError, match="layer 9 does not exist"):
        feasible_depths(FixedPlan([[8, 9]]), 6)


@pytest.mark.parametrize("planner", [GreedyPlanner(), OneShotRanking()], ids=str)
def test_single_layer_leaves_nothing_to_measure(planner: Planner):
    with pytest.raises(InputError, match=r"1 layer: to merge takes 2 or more"):
        plan(tiny_llama(1), TEXT, max_perplexity_ratio=2.0, planner=planner)


@dataclass(frozen=True)
class Counting(OneShotRanking):
    """Nested plans, counted."""

    calls: list[int] = field(default_factory=list)
    nested: ClassVar[bool] = True

    def plan(self, calibration: Calibration, operator: Operator, target: int) -> tuple[MergeStep, ...]:
        self.calls.append(target)
        return GreedyPlanner(candidates=1).plan(calibration, operator, target)


def test_nested_plans_are_cut_instead_of_made_again():
    planner = Counting()
    found = plan(tiny_llama(), TEXT, max_perplexity_ratio=1.3, planner=planner)
    assert found.depth == 5
    assert planner.calls == [3]


@dataclass(frozen=True)
class Failing(OneShotRanking):
    """Fails while it is tried, once a merge is in place."""

    def plan(self, calibration: Calibration, operator: Operator, target: int) -> tuple[MergeStep, ...]:
        return (
            MergeStep((2, 3), {"class_path": "Drop"}, (0.5, 0.5)),
            MergeStep((8, 9), {"class_path": "Drop"}, (1, 0)),
        )


def test_model_is_restored_when_a_trial_fails():
    model = tiny_llama()
    weights = weights_of(model)
    with pytest.raises(InputError, match="does not fit a model of 5 layers"):
        plan_within(Calibration(model, TEXT), Failing(), Drop(), PerplexityRatio(2.0))
    assert_same(model, weights)
    assert len(layers_of(model)) == model.config.num_hidden_layers == 6
