"""The records of the families, checked against the models transformers builds."""

import pytest
from transformers import GPT2Config

from lcprune.errors import InputError
from lcprune.merging.architectures import LAYOUTS, LayerLayout, layout_of
from tests.builders import FAMILIES, Family, tiny_config, tiny_llama


def test_every_layout_has_a_tiny_model():
    assert [layout.model_type for layout in LAYOUTS] == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_the_decoder_layers(family: Family):
    model = tiny_llama(n_layers=5, model_type=family)
    layers = layout_of(model.config).layers_of(model)
    assert len(layers) == 5
    assert {type(layer).__name__ for layer in layers} == {f"{family.capitalize()}DecoderLayer"}


@pytest.mark.parametrize("family", FAMILIES)
def test_final_norm_is_the_norm_outside_the_layers(family: Family):
    model = tiny_llama(model_type=family)
    outside = [name for name, _ in model.named_modules() if "norm" in name and ".layers." not in name]
    assert outside == [layout_of(model.config).final_norm]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_all_norms_of_a_layer(family: Family):
    model = tiny_llama(model_type=family)
    layout = layout_of(model.config)
    layer = layout.layers_of(model)[0]
    assert {name for name, module in layer.named_modules() if "RMSNorm" in type(module).__name__} == set(layout.norms)
    assert {name for name, _ in layer.named_parameters() if layout.is_norm(name)} == {
        f"{n}.weight" for n in layout.norms
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_indexed_modules_are_all_that_know_the_layers_number(family: Family):
    model = tiny_llama(model_type=family)
    layout = layout_of(model.config)
    for index, layer in enumerate(layout.layers_of(model)):
        numbered = {name: module.layer_idx for name, module in layer.named_modules() if hasattr(module, "layer_idx")}
        assert numbered == dict.fromkeys(layout.indexed, index)


@pytest.mark.parametrize("family", FAMILIES)
def test_per_layer_fields_name_every_list_of_the_config_that_follows_the_depth(family: Family):
    lengths = [
        {name: len(value) for name, value in vars(tiny_config(n, model_type=family)).items() if isinstance(value, list)}
        for n in (5, 7)
    ]
    follow = {name for name, length in lengths[0].items() if (length, lengths[1].get(name)) == (5, 7)}
    assert follow <= set(layout_of(tiny_config(model_type=family)).per_layer_fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_is_read_from_the_config(family: Family):
    config = tiny_config(n_layers=7, model_type=family)
    assert layout_of(config).depth_of(config) == 7


def test_keep_layers_cuts_every_list_of_the_config_by_position():
    config = tiny_config(n_layers=5, model_type="qwen2")
    config.layer_types = [
        "full_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    layout_of(config).keep_layers(config, [0, 2, 3])
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["full_attention", "sliding_attention", "full_attention"]


def test_keep_layers_passes_over_a_list_that_the_config_lacks():
    config = tiny_config(n_layers=5)
    LayerLayout("llama", per_layer_fields=("layer_types",)).keep_layers(config, [0, 4])
    assert config.num_hidden_layers == 2
    assert getattr(config, "layer_types", None) is None


def test_norm_is_told_by_the_module_and_not_by_a_part_of_its_name():
    layout = LayerLayout("x", norms=("norm", "attn.q_norm"))
    names = ["norm.weight", "attn.q_norm.bias", "attn.norm.weight", "norm_proj.weight", "q_norm.weight", "norm"]
    assert [name for name in names if layout.is_norm(name)] == ["norm.weight", "attn.q_norm.bias"]


def test_unknown_family_is_refused_with_the_known_ones_named():
    with pytest.raises(InputError, match=r"model_type='gpt2'.*it knows llama, mistral, qwen2, qwen3"):
        layout_of(GPT2Config())
