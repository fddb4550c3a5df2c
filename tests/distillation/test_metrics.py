"""Held-out figures against transformers' own, over batches of unequal size."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lcprune.distillation.fused import CHUNK
from lcprune.distillation.head import Head
from lcprune.distillation.metrics import HeldOut


def test_held_out_of_three_tokens_is_these_numbers():
    # Identity heads of two: logits are the states.
    student = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)], [0.0, math.log(3)]])
    teacher = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0], [0.0, 0.0]])
    metric, eye = HeldOut(), Head(torch.eye(2))
    metric.update(student[:2], eye, teacher[:2], eye, torch.tensor([0, 0]))
    metric.update(student[2:], eye, teacher[2:] + torch.tensor([0.0, 1e-3]), eye, torch.tensor([1]))
    figures = {name: value.item() for name, value in metric.compute().items()}
    assert figures["perplexity"] == pytest.approx((4 / 3 * 4 * 4 / 3) ** (1 / 3), rel=1e-4)
    assert figures["teacher_perplexity"] == pytest.approx((4 / 3 * 4 / 3 * 2) ** (1 / 3), rel=1e-3)
    assert figures["agreement"] == pytest.approx(2 / 3)


def test_held_out_in_chunks_is_the_plain_mean():
    generator = torch.Generator().manual_seed(0)
    n = 2 * CHUNK + 7
    states, head = torch.randn(n, 4, generator=generator), Head(torch.randn(11, 4, generator=generator))
    targets = torch.randint(11, (n,), generator=generator)
    metric = HeldOut()
    metric.update(states, head, states, head, targets)
    figures = metric.compute()
    torch.testing.assert_close(figures["perplexity"], cross_entropy(head(states), targets).exp())
    assert figures["agreement"] == 1


def test_held_out_counts_every_token_under_bfloat16_weights():
    # Lightning's bf16-true calls module.to(bfloat16), and 256 + 1 is 256 there.
    module = torch.nn.Module()
    module.metric = HeldOut()
    module.to(torch.bfloat16)
    eye, states = Head(torch.eye(2)), torch.tensor([[math.log(3), 0.0]])
    for _ in range(400):
        module.metric.update(states, eye, states, eye, torch.tensor([0]))
    assert module.metric.tokens.item() == 400
    assert module.metric.compute()["perplexity"].item() == pytest.approx(4 / 3, rel=1e-6)


def test_held_out_of_no_token_claims_nothing():
    metric, nothing = HeldOut(), torch.zeros(0, 2)
    metric.update(nothing, Head(torch.eye(2)), nothing, Head(torch.eye(2)), torch.zeros(0, dtype=torch.long))
    assert all(math.isnan(value.item()) for value in metric.compute().values())


def test_held_out_of_an_impossible_text_is_infinite():
    states = torch.tensor([[2000.0, 0.0]])
    metric = HeldOut()
    metric.update(states, Head(torch.eye(2)), states, Head(torch.eye(2)), torch.tensor([1]))
    assert metric.compute()["perplexity"].item() == math.inf
