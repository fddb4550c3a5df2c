"""The records of the families, checked against the models transformers builds; families without a record."""

import logging

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    GPT2Config,
    GraniteConfig,
    HeliumConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OlmoConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
    T5Config,
)

from lcprune.errors import InputError
from lcprune.merging import architectures, families
from lcprune.merging.architectures import LayerLayout, layout_of
from lcprune.merging.collapse import collapse
from lcprune.merging.concat import Concat
from lcprune.merging.families import LAYOUTS
from lcprune.merging.operators import Drop
from tests.builders import ALL_FAMILIES, Family, tiny_config, tiny_llama
from tests.merging.planning import plain

EXPERTS = {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def test_every_layout_has_a_tiny_model():
    assert {id(layout) for layout in LAYOUTS} == {id(layout_of(tiny_config(model_type=f))) for f in ALL_FAMILIES}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_layers_are_the_decoder_layers(family: Family):
    model = tiny_llama(n_layers=5, model_type=family)
    layers = layout_of(model.config).layers_of(model)
    assert len(layers) == 5
    assert {type(layer).__name__ for layer in layers} <= set(model._no_split_modules or ())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_final_norm_is_the_last_norm_outside_the_layers(family: Family):
    model = tiny_llama(model_type=family)
    layout = layout_of(model.config)
    outside = [name for name, module in model.named_modules() if is_norm(module) and f"{layout.layers}." not in name]
    assert outside[-1] == layout.final_norm
    assert outside[:-1] == (["transformer.word_embeddings_layernorm"] if family == "bloom" else [])


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_norms_are_all_norms_of_a_layer(family: Family):
    model = tiny_llama(model_type=family)
    layout = layout_of(model.config)
    layer = layout.layers_of(model)[0]
    norms = {name for name, module in layer.named_modules() if is_norm(module)}
    assert norms == set(layout.norms)
    assert {name for name, _ in layer.named_parameters() if layout.is_norm(name)} == {
        f"{norm}.{name}" for norm in norms for name, _ in layer.get_submodule(norm).named_parameters()
    }


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_norms_branches_and_experts_are_the_whole_layer(family: Family):
    model = tiny_llama(model_type=family)
    layout = layout_of(model.config)
    branches = (layout.attention, *([layout.mlp] if layout.mlp is not None else []))
    projections = {name for b in branches for name in (b.consumer, *(producer.name for producer in b.producers))}
    names = {name for name, _ in layout.layers_of(model)[0].named_parameters() if not layout.is_norm(name)}
    rest = {name for name in names if name.rpartition(".")[0] not in projections}
    assert rest == (EXPERTS if layout.mlp is None else set())
    assert projections <= {name.rpartition(".")[0] for name in names}
    assert {norm for branch in branches for norm in (branch.norm, branch.norm_after) if norm} <= set(layout.norms)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_norms_of_the_branches_run_in_front_of_and_behind_them(family: Family):
    model = tiny_llama(model_type=family)
    layout = layout_of(model.config)
    layer = layout.layers_of(model)[0]
    order: list[str] = []
    for name, module in layer.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: order.append(name))
    model(torch.tensor([[5, 6]]), use_cache=False)
    for branch in (layout.attention, layout.mlp):
        if branch is not None:
            path = [branch.norm, branch.producers[0].name, branch.consumer, branch.norm_after]
            places = [order.index(name) for name in path if name]
            assert places == sorted(places)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_norm_offset_and_storage_order_are_the_modules_own(family: Family):
    model = tiny_llama(model_type=family)
    layout = layout_of(model.config)
    layer = layout.layers_of(model)[0]
    assert architectures._norm_offset(layer.get_submodule(layout.norms[0])) == layout.norm_offset
    assert (type(layer.get_submodule(layout.attention.consumer)).__name__ == "Conv1D") == layout.transposed


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_indexed_modules_are_all_that_know_the_layers_number(family: Family):
    model = tiny_llama(model_type=family)
    layout = layout_of(model.config)
    for index, layer in enumerate(layout.layers_of(model)):
        numbered = {name: module.layer_idx for name, module in layer.named_modules() if hasattr(module, "layer_idx")}
        assert numbered == dict.fromkeys(layout.indexed, index)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_per_layer_fields_name_every_list_of_the_config_that_follows_the_depth(family: Family):
    lengths = [
        {name: len(value) for name, value in vars(tiny_config(n, model_type=family)).items() if isinstance(value, list)}
        for n in (5, 7)
    ]
    follow = {name for name, length in lengths[0].items() if (length, lengths[1].get(name)) == (5, 7)}
    assert follow <= set(layout_of(tiny_config(model_type=family)).per_layer_fields)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_depth_is_read_from_the_config(family: Family):
    config = tiny_config(n_layers=7, model_type=family)
    assert layout_of(config).depth_of(config) == 7


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_kv_heads_divide_what_attention_computes_for_them(family: Family):
    model = tiny_llama(model_type=family)
    layout = layout_of(model.config)
    heads = layout.kv_heads_of(model.config)
    cache = model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    cached = cache.layers[0].keys.shape[1]
    assert (heads, cached) == ((2, 4) if family == "falcon" else (cached, cached))  # it repeats keys, then caches them


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


def test_kind_of_a_layer_is_its_entries_in_the_lists():
    config = tiny_config(n_layers=4, model_type="smollm3")
    kinds = [layout_of(config).kind_of(config, index) for index in range(4)]
    assert kinds == [("full_attention", 1), ("sliding_attention", 0)] * 2
    assert layout_of(tiny_config()).kind_of(tiny_config(), 0) == ()


def test_norm_is_told_by_the_module_and_not_by_a_part_of_its_name():
    layout = LayerLayout("x", norms=("norm", "attn.q_norm"))
    names = ["norm.weight", "attn.q_norm.bias", "attn.norm.weight", "norm_proj.weight", "q_norm.weight", "norm"]
    assert [name for name in names if layout.is_norm(name)] == ["norm.weight", "attn.q_norm.bias"]


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (OPTConfig(do_layer_norm_before=False, word_embed_proj_dim=512), "do_layer_norm_before=False"),
        (Qwen3MoeConfig(decoder_sparse_step=2), "decoder_sparse_step=2"),
        (Qwen3MoeConfig(mlp_only_layers=[0, 3]), r"mlp_only_layers=\[0, 3\]"),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_settings_that_no_record_holds_for_are_refused_with_those_that_one_does(config: PreTrainedConfig, given: str):
    with pytest.raises(InputError, match=rf"model_type='{config.model_type}' with {given} .* only with \w+="):
        layout_of(config)


# Families without a record.

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"vocab_size": 97, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _nothing_recognised_yet(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(architectures, "_RECOGNISED", {})


@pytest.mark.parametrize("kind", [GraniteConfig, HeliumConfig, OlmoConfig, StableLmConfig])
def test_unlisted_family_of_llamas_shape_is_recognised_and_the_log_says_so_once(
    kind: type[PreTrainedConfig], caplog: pytest.LogCaptureFixture
):
    config = kind(**SIZES)
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "lcprune"):
        layout = layout_of(config)
        layout.keep_layers(config, [0, 2])
        assert layout_of(config) is layout
    assert layout == LayerLayout(config.model_type, per_layer_fields=layout.per_layer_fields)
    ours = [record.message for record in caplog.records if record.name.startswith("lcprune")]
    assert [message.split(";")[0] for message in ours] == [f"model_type={config.model_type!r} has no record in lcprune"]
    assert torch.equal(torch.get_rng_state(), before)


class OwnConfig(LlamaConfig):
    """Of a model that nobody has registered with transformers."""

    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnBlocksConfig(LlamaConfig):
    model_type = "own-blocks"


class OwnBlocks(LlamaForCausalLM):
    config_class = OwnBlocksConfig

    def __init__(self, config: OwnBlocksConfig) -> None:
        super().__init__(config)
        self.blocks = self.model.layers


def test_class_of_ones_own_that_is_shaped_like_llama_is_recognised_without_being_registered():
    model = OwnModel(OwnConfig(**SIZES))
    assert layout_of(model.config) == LayerLayout("own", per_layer_fields=())
    assert collapse(model, plain(), target_depth=2).depth == model.config.num_hidden_layers == 2


def test_record_that_is_added_from_outside_is_found(monkeypatch: pytest.MonkeyPatch):
    record = LayerLayout("own-blocks", layers="blocks")
    monkeypatch.setattr(families, "LAYOUTS", (*LAYOUTS, record))
    model = OwnBlocks(OwnBlocksConfig(**SIZES))
    assert layout_of(model.config) is record
    assert collapse(model, plain(), target_depth=2).depth == len(model.blocks) == 2
    assert layout_of(tiny_config()) is LAYOUTS[0]


def test_recognised_family_brings_its_norms_numbers_and_lists():
    layout = layout_of(StableLmConfig(**SIZES, qk_layernorm=False, layer_types=["full_attention"] * 3))
    assert layout.per_layer_fields == ("layer_types",)
    assert layout.indexed == ("self_attn",)


def test_lists_inside_layers_are_not_taken_for_the_layers_and_their_norms_of_single_heads_keep_heads_together():
    layout = layout_of(StableLmConfig(**SIZES, qk_layernorm=True))
    assert (layout.layers, layout.norms[1]) == ("model.layers", "self_attn.q_layernorm.norms.0")
    Drop().check(layout)
    with pytest.raises(InputError, match=r"Concat cannot merge layers of stablelm, whose heads have norms .*use Drop"):
        Concat().check(layout)


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (CohereConfig(**SIZES), "no post_attention_layernorm"),
        (StableLmConfig(**SIZES, use_parallel_residual=True), "no post_attention_layernorm"),
        (Starcoder2Config(**SIZES), "no mlp.down_proj"),
        (MambaConfig(**SIZES), "its layers are at backbone.layers"),
        (T5Config(num_layers=2), "builds no causal LM"),
    ],
    ids=["parallel", "setting", "mlp", "state space", "encoder-decoder"],
)
def test_unknown_family_is_refused_with_the_difference_the_known_ones_and_the_record_to_add(
    config: PreTrainedConfig, difference: str
):
    with pytest.raises(InputError) as error:
        layout_of(config)
    sentence = str(error.value)
    assert f"model_type={config.model_type!r}" in sentence
    assert difference in sentence
    assert "it knows llama, mistral, qwen2, qwen3," in sentence
    assert f"LayerLayout({config.model_type!r}, layers=" in sentence
    assert "\n" not in sentence


def test_layers_of_different_shapes_are_not_llamas(monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama(n_layers=3)
    model.model.layers[1].mlp.down_proj = nn.Linear(64, 33, bias=False)
    monkeypatch.setattr(architectures.AutoModelForCausalLM, "from_config", lambda config, **_: model)
    with pytest.raises(InputError, match="its layers differ in shape"):
        layout_of(GraniteConfig(**SIZES))
