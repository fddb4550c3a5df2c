"""Weights of neighbours and states of all boundaries, against numbers made by hand and plain transformers."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, Calibration, layer_outputs
from lcprune.merging.criteria import BlockInfluence
from lcprune.merging.heatmaps import TOKEN_CHUNK, state_cosines, weight_distances
from tests.builders import FAMILIES, Family, tiny_llama, token_batches


def plain(n_batches: int = 3) -> list[Batch]:
    return [{"input_ids": ids} for ids in token_batches(n_batches)]


def fill(model: PreTrainedModel, values: list[float]) -> None:
    """Every matrix of layer l holds values[l] everywhere."""
    with torch.no_grad():
        for layer, value in zip(layout_of(model.config).layers_of(model), values, strict=True):
            for parameter in layer.parameters():
                parameter.fill_(value)


def test_weight_distances_by_hand():
    model = tiny_llama(3)
    fill(model, [1.0, 3.0, -3.0])
    distances = weight_distances(model)
    down = distances.matrices.index("mlp.down_proj.weight")  # 32 x 64
    assert distances.raw[0][down] == pytest.approx(2 * sqrt(32 * 64))
    assert distances.raw[1][down] == pytest.approx(6 * sqrt(32 * 64))
    assert distances.normalised[0][down] == pytest.approx(2 / sqrt(1 + 9))
    assert distances.normalised[1][down] == pytest.approx(sqrt(2))  # opposite


def test_weight_distances_of_equal_layers_are_zero():
    model = tiny_llama(4)
    layers = layout_of(model.config).layers_of(model)
    layers[2].load_state_dict(layers[1].state_dict())
    distances = weight_distances(model)
    assert set(distances.raw[1]) == set(distances.normalised[1]) == {0.0}
    assert min(distances.raw[0]) > 0


def test_weight_distances_of_weights_without_common_entries_are_one():
    model = tiny_llama(2)
    with torch.no_grad():
        for number, layer in enumerate(layout_of(model.config).layers_of(model)):
            for parameter in layer.parameters():
                parameter.fill_(1.0).flatten()[number::2].zero_()
    assert weight_distances(model).normalised[0] == pytest.approx([1.0] * 7)


def test_weight_distances_of_zeros_are_zero_not_nan():
    model = tiny_llama(2)
    fill(model, [0.0, 0.0])
    assert set(weight_distances(model).normalised[0]) == {0.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_distances_name_every_matrix_and_no_vector(family: Family):
    distances = weight_distances(tiny_llama(3, model_type=family))
    projections = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    assert set(distances.matrices) == projections | {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert {len(row) for row in distances.raw} == {len(distances.matrices)}
    assert len(distances.raw) == 2


def test_weight_distances_of_bfloat16_are_measured_in_float32():
    model = tiny_llama(2, dtype=torch.bfloat16)
    layers = layout_of(model.config).layers_of(model)
    expected = torch.dist(layers[0].mlp.up_proj.weight.float(), layers[1].mlp.up_proj.weight.float()).item()
    distances = weight_distances(model)
    assert distances.raw[0][distances.matrices.index("mlp.up_proj.weight")] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_cosines_are_those_of_hidden_states_with_hooks_for_the_last_layer(family: Family):
    model = tiny_llama(model_type=family)
    ids = torch.cat(token_batches())
    with torch.no_grad(), layer_outputs(layout_of(model.config).layers_of(model), [5]) as outputs:
        states = [*model(ids, output_hidden_states=True, use_cache=False).hidden_states[:-1], outputs[5]]
    cosines = state_cosines(model, plain())
    for a, before in enumerate(states):
        for b, after in enumerate(states):
            expected = cosine_similarity(before, after, dim=-1).mean().item()
            assert cosines[a, b].item() == pytest.approx(expected, abs=1e-5)


def test_state_cosines_are_symmetric_with_ones_on_the_diagonal():
    cosines = state_cosines(tiny_llama(), plain())
    assert cosines.shape == (7, 7)
    torch.testing.assert_close(cosines, cosines.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(cosines.diagonal(), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-6)


def test_state_cosines_next_to_the_diagonal_are_block_influence():
    model = tiny_llama()
    influence = BlockInfluence().score(Calibration(model, plain()))
    assert (1 - state_cosines(model, plain()).diagonal(1)).tolist() == pytest.approx(influence, abs=1e-6)


def test_state_cosines_do_not_depend_on_how_the_text_is_cut():
    model = tiny_llama()
    ids = torch.cat(token_batches(8, length=64))  # 1024 tokens, several chunks
    assert ids.numel() > 2 * TOKEN_CHUNK
    together = state_cosines(model, [{"input_ids": ids}])
    apart = state_cosines(model, [{"input_ids": row[None]} for row in ids])
    torch.testing.assert_close(apart, together, rtol=0, atol=2e-6)


def test_state_cosines_leave_out_masked_tokens():
    model = tiny_llama()
    ids = token_batches(1)[0]
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    masked = state_cosines(model, [{"input_ids": ids, "attention_mask": mask}])
    torch.testing.assert_close(masked, state_cosines(model, [{"input_ids": ids[:, :10]}]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "compute", [lambda model: weight_distances(model), lambda model: state_cosines(model, plain())]
)
def test_heat_maps_leave_model_mode_and_hooks_as_they_were(compute: Callable[[PreTrainedModel], object]):
    model = tiny_llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compute(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    layers = layout_of(model.config).layers_of(model)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    assert all(parameter.grad is None for parameter in model.parameters())
