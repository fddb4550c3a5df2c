"""A student beside its teacher outside a trainer: agreement, divergence and perplexity of full logits, in chunks."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lcprune.distillation import comparison, metrics
from lcprune.distillation.teacher import Teacher
from tests.builders import Family, tiny_llama, token_batches

BATCHES = [{"input_ids": ids, "labels": ids.clone()} for ids in token_batches(2, 3, 12)]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("chunk", [5, 256])
def test_comparison_is_that_of_full_logits(model_type: Family, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    student, teacher = (tiny_llama(depth, model_type=model_type, seed=depth) for depth in (2, 3))
    ids = torch.cat([batch["input_ids"] for batch in BATCHES])
    with torch.no_grad():
        mine, theirs = (model(input_ids=ids).logits[:, :-1].flatten(0, 1).double() for model in (student, teacher))
    targets = ids[:, 1:].flatten()
    found = comparison.compare(student, Teacher(teacher), BATCHES)
    assert found.tokens == len(targets) == 66
    assert found.perplexity == pytest.approx(cross_entropy(mine, targets).exp().item(), rel=1e-5)
    assert found.teacher_perplexity == pytest.approx(cross_entropy(theirs, targets).exp().item(), rel=1e-5)
    assert found.agreement == pytest.approx((mine.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    p, q = theirs.log_softmax(-1), mine.log_softmax(-1)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_comparison_with_itself_agrees_and_diverges_by_nothing():
    model = tiny_llama(2)
    found = comparison.compare(model, Teacher(tiny_llama(2)), BATCHES)
    assert (found.agreement, found.kl) == (1.0, 0.0)
    assert found.perplexity == found.teacher_perplexity == pytest.approx(comparison.alone(model, BATCHES)[0], rel=1e-6)


def test_comparison_scores_only_what_counts():
    ids = BATCHES[0]["input_ids"]
    labels = ids.clone()
    labels[:, :6] = -100
    masked = comparison.compare(tiny_llama(2), Teacher(tiny_llama(3)), [{"input_ids": ids, "labels": labels}])
    assert masked.tokens == 3 * 6
    assert not math.isclose(
        masked.kl, comparison.compare(tiny_llama(2), Teacher(tiny_llama(3)), BATCHES[:1]).kl, rel_tol=1e-3
    )


def test_comparison_leaves_models_as_they_were():
    student = tiny_llama(2).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    comparison.compare(student, Teacher(tiny_llama(3)), BATCHES)
    assert student.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
