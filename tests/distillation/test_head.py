"""What a head makes of states, as literal numbers and as transformers does it, and what a copy keeps."""

import math

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lcprune.distillation.head import Head, LowRank
from lcprune.distillation.teacher import head_of
from lcprune.errors import InputError
from lcprune.merging.calibration import hidden_states, logits
from tests import builders
from tests.distillation import heads


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, (2.0, -1.0)),
        ({"bias_V": torch.tensor([0.5, 1.0])}, (2.5, 0.0)),
        ({"scale": 0.5}, (1.0, -0.5)),
        ({"bias_V": torch.tensor([0.5, 1.0]), "scale": 2.0}, (5.0, 0.0)),
        ({"cap": 4.0}, (4 * math.tanh(0.5), 4 * math.tanh(-0.25))),
        ({"scale": 2.0, "cap": 4.0}, (4 * math.tanh(1.0), 4 * math.tanh(-0.5))),
        # A h = 2 - 1 = 1; 0.5 * B * 1 = (1, 1.5)
        ({"low_rank": LowRank(torch.ones(1, 2), torch.tensor([[2.0], [3.0]]), 0.5)}, (3.0, 0.5)),
    ],
)
def test_logits_of_two_classes_are_these_numbers(more: dict, expected: tuple[float, float]):
    logits = Head(torch.eye(2), **more)(torch.tensor([[2.0, -1.0]]))
    torch.testing.assert_close(logits, torch.tensor([expected]))


@pytest.mark.parametrize("kind", heads.KINDS_OF_HEADS)
def test_adapter_counts_as_part_of_the_weight(kind: str):
    head, states = heads.head(0, **heads.KINDS_OF_HEADS[kind]), torch.randn(5, heads.D)
    adapter = head.low_rank
    whole = head.weight_VD
    if adapter is not None:
        whole = whole + adapter.scaling * adapter.up_VR @ adapter.down_RD
    merged = Head(whole, head.bias_V, scale=head.scale, cap=head.cap)
    torch.testing.assert_close(head(states), merged(states))


@pytest.mark.parametrize("kind", heads.KINDS_OF_HEADS)
def test_copies_of_a_head_compute_the_same(kind: str):
    head, states = heads.head(0, **heads.KINDS_OF_HEADS[kind]), torch.randn(5, heads.D)
    constant = head.detach()
    assert head(states).requires_grad
    assert not constant(states).requires_grad
    assert constant(states).equal(head(states))
    double = head.to(torch.float64)
    assert all(tensor is None or tensor.dtype == torch.float64 for tensor in double.tensors)
    torch.testing.assert_close(double(states.double()).float(), head(states))
    for ours, theirs in zip(head.to(torch.float32).tensors, head.tensors, strict=True):
        assert ours is theirs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", builders.ALL_FAMILIES)
def test_head_of_a_model_makes_its_logits(family: builders.Family, tied: bool, batch: dict[str, Tensor]):
    model = builders.tiny_llama(2, tied, model_type=family)
    head = head_of(model)
    assert head.weight_VD is model.get_output_embeddings().weight
    with torch.no_grad():
        states = hidden_states(model, batch)
        torch.testing.assert_close(head(states), model(**batch).logits)
        torch.testing.assert_close(head(states), logits(model, states))


@pytest.mark.parametrize(
    ("model_type", "setting", "scale"),
    [("cohere", {"logit_scale": 0.25}, 0.25), ("granite", {"logits_scaling": 8.0}, 0.125)],
)
def test_head_of_a_model_scales_as_its_family_does(
    model_type: str, setting: dict[str, float], scale: float, batch: dict[str, Tensor]
):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.2}
    config = AutoConfig.for_model(model_type, vocab_size=97, num_key_value_heads=2, **shape, **special, **setting)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = head_of(model)
    assert head.scale == scale
    with torch.no_grad():
        states = hidden_states(model, batch)
        torch.testing.assert_close(head(states), model(**batch).logits)
        torch.testing.assert_close(head(states), logits(model, states))


def test_head_that_is_not_linear_is_refused_by_name():
    model = builders.tiny_llama(1, tied=False)
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(InputError, match="'llama' has a Sequential as its output layer"):
        head_of(model)
