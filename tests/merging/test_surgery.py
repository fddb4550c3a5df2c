"""Merging in place: what changes, what stays the same object, and what comes back."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lcprune.distillation.teacher import second_view
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, Rdsc, ReplaceWithLast, WeightedAverage, spec_of
from tests.builders import FAMILIES, Family, tiny_llama, token_batches

OPERATORS: tuple[Operator, ...] = (Drop(keep="last"), Rdsc(), ReplaceWithLast(), WeightedAverage())


def step(*group: int, operator: Operator | None = None) -> MergeStep:
    spec = spec_of(operator if operator is not None else Drop(keep="last"))
    return MergeStep(group, spec, (1 / len(group),) * len(group))


STEPS = (step(4, 5), step(1, 2, 3, operator=ReplaceWithLast()))  # of six layers, three are left


def layers_of(model: PreTrainedModel) -> Any:
    return layout_of(model.config).layers_of(model)


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(token_batches(1)[0], use_cache=False).logits
    return logits


def state_of(model: PreTrainedModel) -> dict[str, object]:
    """All that surgery could touch, tensors copied, objects by identity."""
    layers = layers_of(model)
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "storage": [parameter.data_ptr() for parameter in model.parameters()],
        "objects": [id(thing) for thing in (layers, *layers, *model.parameters())],
        "config": copy.deepcopy(model.config.to_dict()),
        "configs": [id(vars(module).get("config")) for module in model.modules()],
        "numbers": [layer.self_attn.layer_idx for layer in layers],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "logits": logits_of(model),
    }


def assert_unchanged(model: PreTrainedModel, before: dict[str, object]) -> None:
    after = state_of(model)
    tensors = ("weights", "logits")
    torch.testing.assert_close({n: after[n] for n in tensors}, {n: before[n] for n in tensors}, rtol=0, atol=0)
    assert {n: after[n] for n in after if n not in tensors} == {n: before[n] for n in before if n not in tensors}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_merged_layer_holds_what_the_operator_computes(operator: Operator, family: Family):
    model = tiny_llama(model_type=family)
    group = [{name: p.detach().clone() for name, p in layer.named_parameters()} for layer in layers_of(model)[1:4]]
    expected = operator.merge(group, (1 / 3,) * 3, layout_of(model.config))
    surgery.apply(model, step(1, 2, 3, operator=operator))
    torch.testing.assert_close(dict(layers_of(model)[1].named_parameters()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_outside_the_group_are_the_same_modules_in_order(family: Family):
    model = tiny_llama(model_type=family)
    before = list(layers_of(model))
    surgery.apply(model, step(1, 2, 3))
    assert list(layers_of(model)) == [before[index] for index in (0, 1, 4, 5)]


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_and_numbering_follow_the_merge(family: Family):
    model = tiny_llama(model_type=family)
    surgery.apply_all(model, STEPS)
    assert model.config.num_hidden_layers == len(layers_of(model)) == 3
    assert [layer.self_attn.layer_idx for layer in layers_of(model)] == [0, 1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_is_that_of_the_full_forward_pass(family: Family):
    model = tiny_llama(model_type=family)
    surgery.apply_all(model, STEPS)
    prompt = token_batches(1)[0]
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    cached = model.generate(  # type: ignore[operator]
        prompt, attention_mask=mask, use_cache=True, output_logits=True, return_dict_in_generate=True, **greedy
    )
    with torch.no_grad():
        full = model(cached.sequences, use_cache=False).logits
    assert cached.sequences.shape == (2, 28)  # past the sliding windows of 8
    torch.testing.assert_close(torch.stack(cached.logits, 1), full[:, 15:-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_reloaded_model_has_equal_logits(family: Family, tied: bool, tmp_path: Path):
    model = tiny_llama(tied=tied, model_type=family)
    surgery.apply_all(model, STEPS)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_reloaded_config_has_the_layer_types_of_the_layers_whose_weights_were_kept(family: Family, tmp_path: Path):
    model = tiny_llama(model_type=family)
    types = list(model.config.layer_types)
    surgery.apply_all(model, STEPS)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        again.config.layer_types == model.config.layer_types == [types[index] for index in (0, 3, 5)]
    )  # the last of (1, 2, 3) and of (4, 5)


def test_layer_types_of_qwen2_differ_so_that_the_tests_above_can_fail():
    assert tiny_llama(model_type="qwen2").config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 4


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_parameters_of_the_base_keep_their_identity(operator: Operator):
    model = tiny_llama()
    before = list(layers_of(model)[1].parameters())
    surgery.apply(model, step(1, 2, 3, operator=operator))
    after = list(layers_of(model)[1].parameters())
    assert all(left is right for left, right in zip(before, after, strict=True))


def test_outcome_names_the_merged_and_the_removed_parameters():
    model = tiny_llama()
    layers = list(layers_of(model))
    outcome = surgery.apply(model, step(1, 2, 3))
    assert [id(p) for p in outcome.merged] == [id(p) for p in layers[1].parameters()]
    assert [id(p) for p in outcome.removed] == [id(p) for layer in layers[2:4] for p in layer.parameters()]


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@pytest.mark.parametrize("merge", [surgery.apply, lambda model, step: surgery.trial(model, step).__enter__()])
def test_teacher_that_shares_its_tensors_is_not_changed(merge: Callable[..., object], operator: Operator):
    teacher = tiny_llama()
    student = second_view(teacher)
    before = state_of(teacher)
    merge(student, step(1, 2, 3, operator=operator))
    assert_unchanged(teacher, before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "merge",
    [
        lambda model: surgery.apply(model, STEPS[0]),
        lambda model: surgery.replay(model, MergeHistory(6, STEPS)),
    ],
    ids=["apply", "replay"],
)
def test_model_built_from_the_same_config_object_is_not_changed(
    merge: Callable[[PreTrainedModel], object], family: Family
):
    teacher = tiny_llama(model_type=family)
    student = AutoModelForCausalLM.from_config(teacher.config)
    assert student.config is teacher.config
    before = state_of(teacher)
    merge(student)
    assert_unchanged(teacher, before)
    assert {id(config) for module in student.modules() if (config := vars(module).get("config"))} == {
        id(student.config)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_trial_leaves_both_models_of_one_config_object_as_they_were(family: Family):
    teacher = tiny_llama(model_type=family)
    student = AutoModelForCausalLM.from_config(teacher.config)
    before = [state_of(model) for model in (teacher, student)]
    with surgery.trial(student, STEPS[0]), surgery.trial(student, STEPS[1]):
        assert_unchanged(teacher, before[0])
    for model, state in zip((teacher, student), before, strict=True):
        assert_unchanged(model, state)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_merged_layer_trains_without_moving_the_layer_it_was_taken_from(operator: Operator):
    teacher = tiny_llama()
    student = second_view(teacher)
    before = state_of(teacher)
    surgery.apply(student, step(1, 2, 3, operator=operator))
    with torch.no_grad():
        for parameter in layers_of(student)[1].parameters():
            parameter.add_(1.0)
    assert_unchanged(teacher, before)


def test_frozen_and_trained_parameters_stay_frozen_and_trained():
    model = tiny_llama()
    layers_of(model)[1].mlp.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in layers_of(model)[1].named_parameters()}
    surgery.apply(model, step(1, 2, 3, operator=Rdsc()))
    after = {name: parameter.requires_grad for name, parameter in layers_of(model)[1].named_parameters()}
    assert after == before
    assert len(set(after.values())) == 2


def test_second_view_is_frozen_where_the_model_is():
    model = tiny_llama()
    layers_of(model)[1].mlp.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    after = {name: parameter.requires_grad for name, parameter in surgery.second_view(model).named_parameters()}
    assert after == before
    assert len(set(after.values())) == 2


def test_gradients_reach_the_merged_layer():
    model = tiny_llama()
    surgery.apply(model, step(1, 2, 3, operator=Rdsc()))
    model(token_batches(1)[0], use_cache=False).logits.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_hidden_states_follow_the_depth_after_a_merge(family: Family):
    model = tiny_llama(model_type=family)
    ids = token_batches(1)[0]
    depths = []
    with torch.no_grad():
        model(ids, output_hidden_states=True)  # transformers installs its capture hooks now, once per model
        for merge in STEPS:
            surgery.apply(model, merge)
            depths.append(len(model(ids, output_hidden_states=True).hidden_states) - 1)
    assert depths == [5, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_trial_is_the_merge_itself(family: Family):
    model, merged = tiny_llama(model_type=family), tiny_llama(model_type=family)
    surgery.apply_all(merged, STEPS)
    with surgery.trial(model, *STEPS):
        assert model.config.to_dict() == merged.config.to_dict()
        assert torch.equal(logits_of(model), logits_of(merged))


def once(model: PreTrainedModel) -> AbstractContextManager[None]:
    return surgery.trial(model, *STEPS)


@contextmanager
def nested(model: PreTrainedModel) -> Iterator[None]:
    with surgery.trial(model, STEPS[0]), surgery.trial(model, STEPS[1]), surgery.trial(model, step(0, 1, 2)):
        yield


@contextmanager
def inside_out(model: PreTrainedModel) -> Iterator[None]:
    """An inner trial that fails must leave the outer one whole."""
    with surgery.trial(model, STEPS[0]):
        during = state_of(model)
        with pytest.raises(ZeroDivisionError), surgery.trial(model, step(2, 3, 4, operator=Rdsc())):
            raise ZeroDivisionError
        assert_unchanged(model, during)
        yield


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trial", [once, nested, inside_out])
def test_trial_leaves_the_model_bit_for_bit(trial: Callable[..., AbstractContextManager[None]], family: Family):
    model = tiny_llama(model_type=family)
    before = state_of(model)
    with trial(model):
        assert len(layers_of(model)) < 6
        assert not torch.equal(logits_of(model), before["logits"])  # type: ignore[arg-type]
    assert_unchanged(model, before)


def test_trial_that_merges_a_merged_layer_again_leaves_the_model_bit_for_bit():
    model = tiny_llama()
    before = state_of(model)
    with surgery.trial(model, *[step(1, 2, operator=WeightedAverage())] * 2):
        assert len(layers_of(model)) == 4
    assert_unchanged(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_trial_leaves_the_model_bit_for_bit_when_the_body_raises(family: Family):
    model = tiny_llama(model_type=family)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), surgery.trial(model, *STEPS):
        raise ZeroDivisionError
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "bad", [step(4, 5), MergeStep((0, 1), {"class_path": "Dorp"}, (0.5, 0.5))], ids=["group", "op"]
)
def test_trial_leaves_the_model_bit_for_bit_when_a_later_step_is_wrong(bad: MergeStep):
    model = tiny_llama(model_type="qwen2")
    before = state_of(model)
    with pytest.raises(InputError), surgery.trial(model, step(2, 3, 4), bad):
        pytest.fail("the body must not run")
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "bad", [step(5, 6), MergeStep((0, 1), {"class_path": "Dorp"}, (0.5, 0.5))], ids=["group", "op"]
)
def test_apply_touches_nothing_when_the_step_is_wrong(bad: MergeStep):
    model = tiny_llama(model_type="qwen2")
    before = state_of(model)
    with pytest.raises(InputError, match=r"group=\[5, 6\] does not fit a model of 6 layers|'Dorp' is not an operator"):
        surgery.apply(model, bad)
    assert_unchanged(model, before)


@dataclass(frozen=True)
class MeanInFloat32(Operator):
    """A user's own operator that forgets to go back to the members' dtype."""

    def merge(self, members: Any, shares: Any, layout: Any, activity: Any = ()) -> dict[str, Tensor]:
        return {name: sum(member[name].float() for member in members) / len(members) for name in members[0]}


@dataclass(frozen=True)
class Spoilt(Operator):
    """A user's own operator whose last tensor is wrong."""

    how: str = "missing"

    def merge(self, members: Any, shares: Any, layout: Any, activity: Any = ()) -> dict[str, Tensor]:
        merged = {name: theta.clone() + 1 for name, theta in members[0].items()}
        name, theta = merged.popitem()
        wrong = {"missing": {}, "surplus": {name: theta, "own.weight": theta}, "shape": {name: theta[:3]}}
        return merged | wrong[self.how]


def test_merged_layer_keeps_the_dtype_that_it_had():
    model = tiny_llama(dtype=torch.bfloat16)
    group = [dict(layers_of(model)[index].named_parameters()) for index in (1, 2)]
    expected = {name: theta.bfloat16() for name, theta in MeanInFloat32().merge(group, (), None).items()}
    surgery.apply(model, step(1, 2, operator=MeanInFloat32()))
    torch.testing.assert_close(dict(layers_of(model)[1].named_parameters()), expected, rtol=0, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", r"Spoilt returns no tensor 'post_attention_layernorm.weight'"),
        ("surplus", r"Spoilt returns a tensor 'own.weight', which the layer does not have"),
        ("shape", r"Spoilt returns 'post_attention_layernorm.weight' of shape \[3\], in the layer it is \[32\]"),
    ],
)
def test_apply_touches_nothing_when_an_operator_returns_no_layer(how: str, words: str):
    model = tiny_llama()
    before = state_of(model)
    with pytest.raises(InputError, match=words):
        surgery.apply(model, step(1, 2, operator=Spoilt(how)))
    assert_unchanged(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_rebuilds_the_structure(family: Family):
    merged, replayed = tiny_llama(model_type=family), tiny_llama(model_type=family, seed=1)
    surgery.apply_all(merged, STEPS)
    surgery.replay(replayed, MergeHistory(6, STEPS))
    assert replayed.config.to_dict() == merged.config.to_dict()
    assert [layer.self_attn.layer_idx for layer in layers_of(replayed)] == [0, 1, 2]
    assert {n: t.shape for n, t in replayed.state_dict().items()} == {
        n: t.shape for n, t in merged.state_dict().items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_model_with_the_merged_weights_is_the_merged_model(family: Family):
    merged, replayed = tiny_llama(model_type=family), tiny_llama(model_type=family, seed=1)
    surgery.apply_all(merged, STEPS)
    surgery.replay(replayed, MergeHistory(6, STEPS))
    replayed.load_state_dict(merged.state_dict())
    assert torch.equal(logits_of(replayed), logits_of(merged))


def test_replay_refuses_a_model_of_another_depth_and_leaves_it():
    model = tiny_llama(n_layers=5)
    before = state_of(model)
    with pytest.raises(InputError, match=r"starts from a model of 6 layers, this one has 5.*\(the-teacher\)"):
        surgery.replay(model, MergeHistory(6, STEPS, "the-teacher"))
    assert_unchanged(model, before)
