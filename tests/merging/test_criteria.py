"""Scores: lower = safer to merge, whatever the criterion."""

from contextlib import AbstractContextManager
from math import exp, inf, pi
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.criteria import (
    AngularDistance,
    BlockInfluence,
    Criterion,
    OutputSimilarity,
    TrialPerplexity,
    perplexity,
)
from lcprune.merging.lineage import MergeStep
from tests.builders import FAMILIES, Family, tiny_llama, token_batches
from tests.merging.planning import masked

CRITERIA: tuple[Criterion, ...] = (BlockInfluence(), AngularDistance(), OutputSimilarity(), TrialPerplexity())
DROP_FIRST = {"class_path": "Drop", "init_args": {"keep": "first"}}


def layers_of(model: PreTrainedModel) -> Any:
    return layout_of(model.config).layers_of(model)


def plain() -> list[Batch]:
    return [{"input_ids": ids} for ids in token_batches()]


def self_taught(model: PreTrainedModel) -> list[Batch]:
    """Labels are what the model itself predicts, so that every change of it costs."""
    batches: list[Batch] = []
    for ids in token_batches():
        with torch.no_grad():
            predictions = model(ids, use_cache=False).logits.argmax(-1)
        batches.append({"input_ids": ids, "labels": torch.cat([ids[:, :1], predictions[:, :-1]], dim=1)})
    return batches


def without(model: PreTrainedModel, layer: int) -> AbstractContextManager[None]:
    return surgery.trial(model, MergeStep((layer - 1, layer), DROP_FIRST, (1.0, 0.0)))


@pytest.mark.parametrize(("family", "silent"), [*((family, 2) for family in FAMILIES), ("llama", 0), ("llama", 5)])
@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_layer_of_zeros_scores_lowest(criterion: Criterion, family: Family, silent: int):
    model = tiny_llama(model_type=family)
    with torch.no_grad():
        for parameter in layers_of(model)[silent].parameters():
            parameter.zero_()
    scores = criterion.score(Calibration(model, self_taught(model)))
    assert len(scores) == 6
    assert all(scores[silent] < score for layer, score in enumerate(scores) if layer != silent)


@pytest.mark.parametrize("criterion", [BlockInfluence(), AngularDistance(), OutputSimilarity()], ids=str)
def test_layer_that_changes_nothing_scores_zero(criterion: Criterion):
    model = tiny_llama()
    with torch.no_grad():
        layers_of(model)[3].self_attn.o_proj.weight.zero_()
        layers_of(model)[3].mlp.down_proj.weight.zero_()
    assert criterion.score(Calibration(model, plain()))[3] == pytest.approx(0, abs=1e-3)


def test_block_influence_is_one_minus_the_mean_cosine_of_input_and_output():
    model = tiny_llama()
    with torch.no_grad():
        states = model(torch.cat(token_batches()), output_hidden_states=True, use_cache=False).hidden_states
    expected = 1 - cosine_similarity(states[2], states[3], dim=-1).mean().item()
    assert BlockInfluence().score(Calibration(model, plain()))[2] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("span", [1, 2, 3])
def test_angular_distance_is_the_mean_angle_over_the_span_in_half_turns(span: int):
    model = tiny_llama()
    with torch.no_grad():
        states = model(torch.cat(token_batches()), output_hidden_states=True, use_cache=False).hidden_states
    expected = cosine_similarity(states[2], states[2 + span], dim=-1).arccos().mean().item() / pi
    scores = AngularDistance(span).score(Calibration(model, plain()))
    assert len(scores) == 6 + 1 - span
    assert scores[2] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("span", [0, -1])
def test_angular_distance_refuses_a_span_below_one(span: int):
    with pytest.raises(InputError, match=f"span={span} of AngularDistance must be at least 1"):
        AngularDistance(span)


@pytest.mark.parametrize("family", FAMILIES)
def test_trial_perplexity_is_that_of_transformers_loss_without_the_layer(family: Family):
    model = tiny_llama(model_type=family)
    scores = TrialPerplexity().score(Calibration(model, plain()))
    ids = torch.cat(token_batches())
    for layer in range(1, 6):
        with torch.no_grad(), without(model, layer):
            expected = exp(model(ids, labels=ids, use_cache=False).loss.item())
        assert scores[layer] == pytest.approx(expected, rel=1e-4)


def test_trial_perplexity_without_the_first_layer_feeds_the_embeddings_to_the_second():
    model = tiny_llama()
    score = TrialPerplexity().score(Calibration(model, plain()))[0]
    ids = torch.cat(token_batches())
    drop_last = {"class_path": "Drop", "init_args": {"keep": "last"}}
    with torch.no_grad(), surgery.trial(model, MergeStep((0, 1), drop_last, (0.0, 1.0))):
        expected = exp(model(ids, labels=ids, use_cache=False).loss.item())
    assert score == pytest.approx(expected, rel=1e-4)


def test_trial_perplexity_scores_the_labels_given():
    model = tiny_llama()
    batches = self_taught(model)
    ids, labels = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels"))
    with torch.no_grad(), without(model, 4):
        expected = exp(model(ids, labels=labels, use_cache=False).loss.item())
    assert TrialPerplexity().score(Calibration(model, batches))[4] == pytest.approx(expected, rel=1e-4)


def test_output_similarity_is_one_minus_the_cosine_of_flattened_last_states_per_sequence():
    model, original = tiny_llama(), tiny_llama(seed=1)
    scores = OutputSimilarity().score(Calibration(model, plain(), original))
    ids = torch.cat(token_batches())
    with torch.no_grad():
        reference = original(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        with without(model, 3):
            state = model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
    expected = 1 - cosine_similarity(state.flatten(1), reference.flatten(1), dim=-1).mean().item()
    assert scores[3] == pytest.approx(expected, abs=1e-6)


def test_output_similarity_leaves_padding_out():
    found = []
    for filler in (5, 50):
        batches = masked()
        for batch in batches:
            batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, filler)
        found.append(OutputSimilarity().score(Calibration(tiny_llama(), batches)))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_output_similarity_of_the_original_itself_is_zero():
    calibration = Calibration(tiny_llama(), plain())
    assert OutputSimilarity().measure(calibration, calibration.reference) == pytest.approx(0, abs=1e-6)


def test_output_similarity_counts_no_sequence_that_is_padding_alone():
    batches = plain()
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0] = 0
    calibration = Calibration(tiny_llama(), batches)
    assert OutputSimilarity().measure(calibration, calibration.reference) == pytest.approx(0, abs=1e-6)


def test_output_similarity_of_opposite_states_is_two():
    calibration = Calibration(tiny_llama(), plain())
    opposite = [-state for state in calibration.reference]
    assert OutputSimilarity().measure(calibration, opposite) == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_scoring_leaves_the_model_as_it_was(criterion: Criterion):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = list(layers_of(model))
    criterion.score(Calibration(model, plain()))
    assert list(layers_of(model)) == layers
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_perplexity_is_exp_of_the_mean_loss():
    assert perplexity(6.0, 3) == pytest.approx(7.38905609893065)


def test_perplexity_that_would_overflow_is_infinite():
    assert perplexity(1e6, 1) == inf
