"""LaCo's Algorithm 1: the search against a naive one that copies the model and runs everything in full."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Calibration, hidden_states
from lcprune.merging.concat import Concat
from lcprune.merging.criteria import OutputSimilarity
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.operators import Drop, Operator, Rdsc, ReplaceWithLast, WeightedAverage
from lcprune.merging.planners import ThresholdPlanner
from lcprune.merging.remeasure import measure_activity
from tests.builders import FAMILIES, Family, tiny_llama, token_batches
from tests.merging.planning import groups_of, layers_of, plain


def naive_merge(model: PreTrainedModel, group: Sequence[int], operator: Operator) -> PreTrainedModel:
    """A copy of the model with the group merged, by rebuilding the list of layers."""
    merged = copy.deepcopy(model)
    layers = list(layers_of(merged))
    members = [dict(layers[index].named_parameters()) for index in group]
    with torch.no_grad():
        tensors = operator.merge(members, (1 / len(group),) * len(group), layout_of(model.config))
        for name, parameter in members[0].items():
            parameter.copy_(tensors[name])
    kept = [index for index in range(len(layers)) if index not in group[1:]]
    merged.model.layers = nn.ModuleList(layers[index] for index in kept)
    merged.config.num_hidden_layers = len(kept)
    if getattr(merged.config, "layer_types", None):
        merged.config.layer_types = [merged.config.layer_types[index] for index in kept]
    return merged


def last_state(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.cat(token_batches()), output_hidden_states=True, use_cache=False).hidden_states[-1]


def algorithm_1(
    model: PreTrainedModel, planner: ThresholdPlanner, operator: Operator, target: int, original: PreTrainedModel
) -> list[tuple[tuple[int, ...], float]]:
    """LaCo's search as METHODS.md states it, everything run in full; stops when the target is reached."""
    reference, accepted = last_state(original).flatten(1), []
    c, depth = planner.layers_per_merge, len(layers_of(model))
    base = (depth if planner.highest is None else min(planner.highest, depth)) - c
    while base >= planner.lowest and depth > target:
        k = min(c - 1, depth - base - 1, depth - target)
        group = tuple(range(base, base + k + 1))
        tried = naive_merge(model, group, operator)
        similarity = cosine_similarity(last_state(tried).flatten(1), reference, dim=-1).mean().item()
        if similarity > planner.threshold:
            model = tried
            accepted.append((group, 1 - similarity))
            depth -= k
            base = min(base - planner.interval, depth - c)
        else:
            base -= 1
    return accepted


SEARCHES = [
    (ThresholdPlanner(3, threshold=0.65), 2, Drop(keep="first")),
    (ThresholdPlanner(2, threshold=0.5, interval=1), 2, Drop(keep="last")),
    (ThresholdPlanner(2, threshold=0.6, lowest=0), 2, ReplaceWithLast()),
    (ThresholdPlanner(4, threshold=0.59, highest=7, interval=3), 3, WeightedAverage()),
    (ThresholdPlanner(2, threshold=0.6, highest=6, lowest=2), 1, Rdsc()),
    (ThresholdPlanner(3, threshold=-1.0), 4, ReplaceWithLast()),
]


def test_threshold_planner_measures_what_an_operator_chooses_by():
    model, operator = tiny_llama(n_layers=8), Concat()
    planner = ThresholdPlanner(2, threshold=-1.0)
    steps = planner.plan(Calibration(model, plain()), operator, 6)
    surgery.apply_all(model, steps, lambda wanted: measure_activity(model, plain(), wanted))
    original = Calibration(model, plain(), tiny_llama(n_layers=8))
    with torch.no_grad():
        states = [hidden_states(model, batch) for batch in plain()]
    assert groups_of(steps) == [(6, 7), (4, 5)]
    expected = OutputSimilarity().measure(original, states)
    assert steps[-1].scores["OutputSimilarity"] == pytest.approx(expected, abs=1e-5)


# Without `original`, the reference must be taken before the first trial: inside it the candidate would be its own.
@pytest.mark.parametrize(("planner", "target", "operator"), SEARCHES)
def test_threshold_planner_follows_algorithm_1(planner: ThresholdPlanner, target: int, operator: Operator):
    model = tiny_llama(n_layers=8)
    expected = algorithm_1(model, planner, operator, target, model)
    steps = planner.plan(Calibration(model, plain()), operator, target)
    assert groups_of(steps) == [group for group, _ in expected]
    assert [step.scores["OutputSimilarity"] for step in steps] == pytest.approx([s for _, s in expected], abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_planner_follows_algorithm_1_in_every_family(family: Family):
    model = tiny_llama(n_layers=8, model_type=family)
    planner = ThresholdPlanner(3, threshold=0.45, interval=1)
    expected = algorithm_1(model, planner, ReplaceWithLast(), 2, model)
    assert groups_of(planner.plan(Calibration(model, plain()), ReplaceWithLast(), 2)) == [g for g, _ in expected]


def test_threshold_planner_compares_with_the_original_and_not_with_the_model_as_it_stands():
    original = tiny_llama(n_layers=8)
    model = naive_merge(original, (4, 5), Drop(keep="first"))
    planner = ThresholdPlanner(2, threshold=0.47, interval=1)
    steps = planner.plan(Calibration(model, plain(), original), Drop(keep="first"), 2)
    expected = algorithm_1(model, planner, Drop(keep="first"), 2, original)
    assert groups_of(steps) == [group for group, _ in expected]
    assert groups_of(steps) != [g for g, _ in algorithm_1(model, planner, Drop(keep="first"), 2, model)]


def test_threshold_one_accepts_nothing():
    assert ThresholdPlanner(3, threshold=1.0).plan(Calibration(tiny_llama(), plain()), Drop(), 1) == ()


@pytest.mark.parametrize("target", [2, 5, 7])
@pytest.mark.parametrize("layers_per_merge", [2, 4])
def test_threshold_minus_one_accepts_everything_down_to_the_target(layers_per_merge: int, target: int):
    planner = ThresholdPlanner(layers_per_merge, threshold=-1.0, interval=1, lowest=0)
    steps = planner.plan(Calibration(tiny_llama(n_layers=8), plain()), Drop(), target)
    assert MergeHistory(8, steps).depth == target


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers_per_merge": 1}, "layers_per_merge=1 must be at least 2"),
        ({"lowest": -1}, "lowest=-1 and highest=None must satisfy 0 <= lowest < highest"),
        ({"lowest": 4, "highest": 4}, "lowest=4 and highest=4"),
        ({"interval": 0}, "interval=0 must be at least 1"),
        ({"threshold": 1.5}, "threshold=1.5 must lie between -1 and 1"),
        ({"threshold": float("nan")}, "threshold=nan must lie between -1 and 1"),
    ],
)
def test_threshold_planner_refuses_settings_that_mean_nothing(arguments: dict[str, float], words: str):
    with pytest.raises(InputError, match=words):
        ThresholdPlanner(**arguments)  # type: ignore[arg-type]


def test_threshold_planner_names_all_wrong_settings_at_once():
    with pytest.raises(InputError, match=r"layers_per_merge=0 .*; interval=0 .*; threshold=2"):
        ThresholdPlanner(0, interval=0, threshold=2)


@pytest.mark.parametrize("lowest", [5, 9])
def test_threshold_planner_refuses_a_range_above_the_model(lowest: int):
    with pytest.raises(
        InputError, match=f"lowest={lowest} of ThresholdPlanner leaves no layers to merge in a model of 6"
    ):
        ThresholdPlanner(lowest=lowest).check(6, 3)
