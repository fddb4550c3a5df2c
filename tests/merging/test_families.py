"""Every family from the merge to the reloaded folder: same logits, same cache, same measurements."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoModelForCausalLM,
    CwmConfig,
    GraniteConfig,
    OlmoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StableLmConfig,
)

from lcprune.delivery.export import export
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.activity import Activity
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, collect, hidden_states, logits, token_loss
from lcprune.merging.concat import Concat
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, Rdsc, ReplaceWithLast, WeightedAverage, spec_of
from lcprune.merging.prefix import PrefixCache
from lcprune.merging.remeasure import measure_activity
from tests.builders import ALL_FAMILIES, Family, tiny_config, tiny_llama, tiny_tokenizer, token_batches

EXPERTS: tuple[Family, ...] = ("mixtral", "qwen3_moe")
ALIBI: tuple[Family, ...] = ("bloom", "falcon-rw")
"""Families whose heads see distances differently from place to place."""
MIXED: tuple[Family, ...] = ("qwen2", "smollm3", "gemma2", "gemma3_text")
"""Families whose tiny models have layers of more than one kind."""
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def step(*group: int, operator: Operator, shares: tuple[float, ...] = ()) -> MergeStep:
    return MergeStep(group, spec_of(operator), shares or (1 / len(group),) * len(group))


# Of six layers three are left; the last layers of both groups are of another kind than the first where kinds mix.
STEPS = (step(4, 5, operator=Drop(keep="last")), step(1, 2, 3, operator=ReplaceWithLast()))
HISTORY = MergeHistory(6, STEPS)


def layers_of(model: PreTrainedModel) -> Any:
    return layout_of(model.config).layers_of(model)


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        values: Tensor = model(token_batches(1)[0], use_cache=False).logits
    return values


def settings_of(model: PreTrainedModel) -> list[dict[str, object]]:
    """What the modules of the layers compute with, beside weights."""
    plain = (bool, int, float, str, type(None))
    return [
        {name: value for name, value in vars(module).items() if isinstance(value, plain)}
        for layer in layers_of(model)
        for module in layer.modules()
    ]


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    again: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return again


def padded() -> list[Batch]:
    """One batch without padding, and one with padding on the right."""
    plain, other = token_batches(2)
    mask = (torch.arange(16) < torch.tensor([[11], [16]])).long()
    return [{"input_ids": plain}, {"input_ids": other, "attention_mask": mask}]


def streams_of(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """h_0 .. h_L from transformers, the last one taken before the final norm instead of after it."""
    before_norm: list[Tensor] = []
    norm = model.get_submodule(layout_of(model.config).final_norm)
    handle = norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    return [*states[:-1], before_norm[0]]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_merged_model_survives_saving_with_equal_logits_settings_and_weights(family: Family, tmp_path: Path):
    model = tiny_llama(model_type=family)
    surgery.apply_all(model, STEPS)
    assert layout_of(model.config).depth_of(model.config) == len(layers_of(model)) == 3
    again = reloaded(model, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    assert settings_of(again) == settings_of(model)
    theirs = again.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_reloaded_model_generates_with_a_cache_what_it_computes_without(family: Family, tmp_path: Path):
    model = tiny_llama(model_type=family)
    surgery.apply_all(model, STEPS)
    prompt = token_batches(1)[0]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = reloaded(model, tmp_path).generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), output_logits=True, return_dict_in_generate=True, **options
    )
    with torch.no_grad():
        full = model(cached.sequences, use_cache=False).logits
    assert cached.sequences.shape == (2, 28)  # past the sliding windows of 8
    torch.testing.assert_close(torch.stack(cached.logits, 1), full[:, 15:-1], **TOLERANCE)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_export_is_proved(family: Family, tmp_path: Path):
    model = tiny_llama(model_type=family, dtype=torch.bfloat16)
    surgery.apply_all(model, STEPS)
    assert (export(model, tmp_path / "short", tokenizer=tiny_tokenizer(), history=HISTORY) / "config.json").is_file()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_trial_is_the_merge_and_leaves_the_model_bit_for_bit(family: Family):
    model, merged = tiny_llama(model_type=family), tiny_llama(model_type=family)
    surgery.apply_all(merged, STEPS)
    before = (model.config.to_dict(), settings_of(model), list(layers_of(model)))
    weights, values = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits_of(model)
    with surgery.trial(model, *STEPS):
        assert torch.equal(logits_of(model), logits_of(merged))
        assert settings_of(model) == settings_of(merged)
    assert (model.config.to_dict(), settings_of(model), list(layers_of(model))) == before
    assert torch.equal(logits_of(model), values)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_replayed_structure_and_mended_config_take_the_merged_weights(family: Family):
    merged, replayed = tiny_llama(model_type=family), tiny_llama(model_type=family, seed=1)
    surgery.apply_all(merged, STEPS)
    surgery.replay(replayed, HISTORY)
    config = tiny_config(model_type=family)
    surgery.mend_config(config, STEPS)
    for other in (replayed, AutoModelForCausalLM.from_config(config).eval()):
        other.load_state_dict(merged.state_dict())
        assert torch.equal(logits_of(other), logits_of(merged))
        assert settings_of(other) == settings_of(merged)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_prefix_run_is_the_forward_pass_from_every_start(family: Family):
    model, batches = tiny_llama(model_type=family), padded()
    cache = PrefixCache(model, batches, highest=5)
    with torch.no_grad():
        expected = [hidden_states(model, batch) for batch in batches]
    for start in (0, 1, 4, 5):
        torch.testing.assert_close(list(cache.run(start)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_prefix_run_inside_a_trial_is_the_tried_models_forward_pass(family: Family):
    model, batches = tiny_llama(model_type=family), padded()
    cache = PrefixCache(model, batches, highest=1)
    with surgery.trial(model, *STEPS), torch.no_grad():
        expected = [hidden_states(model, batch) for batch in batches]
        torch.testing.assert_close(list(cache.run(1)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_collected_cosines_are_those_of_transformers_states(family: Family):
    model, batches = tiny_llama(model_type=family), padded()
    cosines: list[list[Tensor]] = [[] for _ in range(6)]
    for batch in batches:
        states = streams_of(model, batch)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for index in range(6):
            cosines[index].append(cosine_similarity(states[index], states[index + 1], dim=-1)[mask])
    expected = [torch.cat(values).double().mean().item() for values in cosines]
    assert list(collect(model, batches).cosine[1]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_logits_and_loss_from_last_states_are_the_models_own(family: Family, tied: bool):
    model, ids = tiny_llama(tied=tied, model_type=family), token_batches(1)[0]
    with torch.no_grad():
        expected = model(ids, labels=ids, use_cache=False)
        states = hidden_states(model, {"input_ids": ids})
        torch.testing.assert_close(logits(model, states), expected.logits)
    total, tokens = token_loss(model, states, {"input_ids": ids})
    assert total / tokens == pytest.approx(float(expected.loss), rel=1e-4)


def test_capped_head_of_gemma2_changes_its_logits_so_that_the_test_above_can_fail():
    model = tiny_llama(model_type="gemma2")
    states = hidden_states(model, {"input_ids": token_batches(1)[0]})
    assert not torch.allclose(model.get_output_embeddings()(states), logits(model, states), atol=0.1)


@pytest.mark.parametrize("operator", [Rdsc(), WeightedAverage()], ids=str)
@pytest.mark.parametrize("family", EXPERTS)
def test_elementwise_operators_reach_experts_and_router(family: Family, operator: Operator):
    model = tiny_llama(model_type=family)
    members = [{n: p.detach().clone() for n, p in layer.named_parameters()} for layer in layers_of(model)[1:4]]
    surgery.apply(model, step(1, 2, 3, operator=operator, shares=(0.5, 0.25, 0.25)))
    factors = (-1, 1, 1) if isinstance(operator, Rdsc) else (0.5, 0.25, 0.25)
    for name in ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        expected = sum(factor * member[name] for factor, member in zip(factors, members, strict=True))
        torch.testing.assert_close(layers_of(model)[1].get_parameter(name), expected)


@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family not in (*EXPERTS, *ALIBI)])
def test_units_of_both_branches_may_change_places(family: Family):
    """Of a layer and its copy `Concat` keeps every other unit each: the same layer with its units in other places."""
    model = tiny_llama(model_type=family)
    layout, layer = layout_of(model.config), layers_of(model)[2]
    assert layout.mlp is not None
    width, channels = (
        layer.get_submodule(branch.consumer).weight.shape[0 if layout.transposed else 1]
        for branch in (layout.attention, layout.mlp)
    )
    heads = layout.kv_heads_of(model.config)
    activity = [
        Activity((torch.arange(heads) % 2 != place).float()[:, None].repeat(1, width // heads), every_other)
        for place in (0, 1)
        for every_other in [(torch.arange(channels) % 2 != place).float()]
    ]
    tensors = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    merged = Concat(selection="joint").merge([tensors, tensors], (0.5, 0.5), layout, activity)
    assert any(not torch.equal(merged[name], tensor) for name, tensor in tensors.items())
    expected = logits_of(model)
    layer.load_state_dict(merged)
    torch.testing.assert_close(logits_of(model), expected, **TOLERANCE)


@pytest.mark.parametrize("family", EXPERTS)
def test_concat_of_experts_is_refused_by_name(family: Family):
    with pytest.raises(InputError, match=f"Concat cannot merge layers of {family}"):
        surgery.apply(tiny_llama(model_type=family), step(1, 2, operator=Concat()), lambda layers: ())


@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family not in EXPERTS])
def test_concat_by_measured_activity_survives_saving(family: Family, tmp_path: Path):
    model = tiny_llama(model_type=family)
    surgery.apply(model, step(1, 2, operator=Concat()), partial(measure_activity, model, padded()))
    assert torch.equal(logits_of(reloaded(model, tmp_path)), logits_of(model))


# Layers of several kinds.


@pytest.mark.parametrize("family", MIXED)
def test_tiny_models_of_mixed_families_have_several_kinds(family: Family):
    config = tiny_config(model_type=family)
    assert len({layout_of(config).kind_of(config, index) for index in range(6)}) == 2


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("base", range(5))
def test_layer_that_is_kept_computes_in_the_base_what_it_computed_in_its_own_place(base: int, family: Family):
    model, expected = tiny_llama(model_type=family), tiny_llama(model_type=family)
    surgery.apply(model, step(base, base + 1, operator=Drop(keep="last")))
    layout = layout_of(expected.config)
    layout.keep_layers(expected.config, [index for index in range(6) if index != base])
    del layers_of(expected)[base]
    assert torch.equal(logits_of(model), logits_of(expected))


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize(
    ("operator", "shares", "source"),
    [
        (Drop(keep="first"), (0.1, 0.2, 0.7), 0),
        (Drop(keep="last"), (0.7, 0.2, 0.1), 2),
        (Drop(), (0.1, 0.7, 0.2), 1),
        (ReplaceWithLast(), (0.7, 0.2, 0.1), 2),
        (Rdsc(), (0.4, 0.4, 0.2), 0),
        (WeightedAverage(), (0.2, 0.4, 0.4), 1),
    ],
    ids=str,
)
def test_kind_of_a_merged_layer_is_that_of_the_operators_source(
    operator: Operator, shares: tuple[float, ...], source: int, family: Family, tmp_path: Path
):
    for base in (0, 1):
        model = tiny_llama(model_type=family)
        layout = layout_of(model.config)
        kind = layout.kind_of(model.config, base + source)
        chosen = layers_of(model)[base + source].self_attn.sliding_window
        parameters = list(layers_of(model)[base].parameters())
        surgery.apply(model, step(base, base + 1, base + 2, operator=operator, shares=shares))
        assert layout.kind_of(model.config, base) == kind
        assert layers_of(model)[base].self_attn.sliding_window == chosen
        assert all(a is b for a, b in zip(parameters, layers_of(model)[base].parameters(), strict=True))
        again = reloaded(model, tmp_path / str(base))
        assert torch.equal(logits_of(again), logits_of(model))
        assert settings_of(again) == settings_of(model)


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_student_whose_layers_are_all_of_one_kind_survives_saving(kind: str, family: Family, tmp_path: Path):
    model = tiny_llama(model_type=family)
    while kind in (types := model.config.layer_types) and len(set(types)) > 1:
        places = range(len(types) - 1)
        index = next(i for i in places if types[i] != types[i + 1])
        surgery.apply(model, step(index, index + 1, operator=Drop(keep="first" if types[index] == kind else "last")))
    assert set(model.config.layer_types) == {kind}
    assert torch.equal(logits_of(reloaded(model, tmp_path)), logits_of(model))


def test_training_modes_of_the_base_stay_its_own():
    model = tiny_llama(model_type="gemma2")
    layers_of(model)[1].eval()
    layers_of(model)[0].train()
    surgery.apply(model, step(0, 1, operator=Drop(keep="last")))
    assert all(module.training for module in layers_of(model)[0].modules())


def test_layers_of_different_shapes_are_refused_and_nothing_is_touched():
    model = tiny_llama()
    layers_of(model)[2].mlp.down_proj = nn.Linear(48, 32, bias=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"group=\[1, 2\] holds layers whose weights differ in name or shape"):
        surgery.apply(model, step(1, 2, operator=Drop()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Families without a record.

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "vocab_size": 97, "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**SIZES, **HEADS, residual_multiplier=0.5, logits_scaling=2.0, embedding_multiplier=3.0),
        StableLmConfig(**SIZES, **HEADS, use_qkv_bias=True),
        StableLmConfig(**SIZES, **HEADS, qk_layernorm=True),
        OlmoConfig(**SIZES, **HEADS),
        CwmConfig(
            **SIZES, **HEADS, head_dim=8, sliding_window=8, layer_types=["full_attention", "sliding_attention"] * 3
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_recognised_family_is_merged_measured_and_saved_like_a_listed_one(config: PreTrainedConfig, tmp_path: Path):
    torch.manual_seed(0)
    model, batches = AutoModelForCausalLM.from_config(config).eval(), padded()
    cache = PrefixCache(model, batches, highest=1)
    with torch.no_grad():
        states = hidden_states(model, batches[0])
        torch.testing.assert_close(logits(model, states), model(**batches[0], use_cache=False).logits)
    surgery.apply_all(model, STEPS)
    with torch.no_grad():
        expected = [hidden_states(model, batch) for batch in batches]
    torch.testing.assert_close(list(cache.run(1)), expected, rtol=0, atol=0)
    again = reloaded(model, tmp_path)
    assert again.config.num_hidden_layers == 3
    assert torch.equal(logits_of(again), logits_of(model))
    assert settings_of(again) == settings_of(model)
