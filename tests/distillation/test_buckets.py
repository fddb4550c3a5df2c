"""The KL whose teacher is known by its likeliest tokens: literal numbers, its definition, and what it never is."""

import math

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

from lcprune.distillation.buckets import Buckets, top, value_and_gradient
from lcprune.distillation.divergences import Weights
from lcprune.distillation.head import Head
from lcprune.distillation.losses import HeadLoss, bucket_loss
from tests.distillation import heads


def measured(student_CV: Tensor, teacher: Buckets, weights: Weights | None = None) -> tuple[Tensor, Tensor]:
    log_q = student_CV.log_softmax(-1)
    weights = Weights(1.0) if weights is None else weights
    return value_and_gradient(log_q, teacher, weights, out_CV=torch.full_like(log_q, torch.nan))


def by_definition(student_CV: Tensor, teacher: Buckets) -> Tensor:
    """Over the k tokens and the bucket as k + 1 classes, for autograd."""
    q_CV = student_CV.softmax(-1)
    q_Ck = q_CV.gather(1, teacher.ids.long())
    rest_CV = q_CV.scatter(1, teacher.ids.long(), 0.0)
    q = torch.cat([q_Ck, rest_CV.sum(-1, keepdim=True)], 1)
    p = torch.cat([teacher.log_p, teacher.log_tail[:, None]], 1).exp()
    if q_Ck.shape == q_CV.shape:  # the bucket is empty, and 0 log 0 has no gradient
        p, q = p[:, :-1], q[:, :-1]
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def drawn_logits(seed: int, c: int = 5, v: int = 31, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(c, v, generator=generator).to(dtype) * 3 for _ in range(2))
    return student, teacher


def ours(what: heads.Given, k: int, **settings: float) -> HeadLoss:
    """`bucket_loss`, the teacher's tokens taken from its own head."""
    teacher = top(what.teacher(what.teacher_ND).detach(), k)
    return bucket_loss(what.student_ND, what.student, teacher, targets_N=what.targets_N, **settings)  # type: ignore[arg-type]


# p = (1/2, 1/4, 1/8, 1/8), q = (1/4, 1/4, 1/4, 1/4), the first two kept.  By hand:
#   value     1/2 log 2 + 1/4 log 1 + (1/4) log((1/4) / (1/2)) = 1/4 log 2
#   gradient  1/4 - 1/2, 1/4 - 1/4, and 1/4 (1 - (1/4) / (1/2)) = 1/8 twice
def test_bucketed_kl_of_four_tokens_is_this_number():
    teacher = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()
    value_C, grad_CV = measured(torch.zeros(1, 4), top(teacher, 2))
    assert value_C.item() == pytest.approx(0.25 * math.log(2), abs=1e-7)
    assert value_C.item() == pytest.approx(0.173287, abs=1e-6)
    torch.testing.assert_close(grad_CV, torch.tensor([[0.125, -0.25, 0.125, 0.0]]))


def test_likeliest_tokens_come_with_the_mass_of_all_others():
    known = top(torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log(), 2)
    assert known.ids.tolist() == [[1, 3]]
    assert known.ids.dtype == torch.int32
    torch.testing.assert_close(known.log_p.exp(), torch.tensor([[0.5, 0.25]]))
    torch.testing.assert_close(known.log_tail.exp(), torch.tensor([0.25]))


def test_students_tail_may_be_as_small_as_it_likes():
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    value_C, grad_CV = measured(torch.tensor([[0.0, -300.0, -301.0]]), top(teacher, 1))
    rest = math.log(math.exp(-300) + math.exp(-301))
    assert value_C.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - rest), rel=1e-6)
    share = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(grad_CV, torch.tensor([[0.5, -0.5 * share, -0.5 * (1 - share)]]))


def test_tail_far_below_one_keeps_its_digits():
    known = top(torch.tensor([[0.0, -30.0, -30.0]]), 1)
    assert known.log_tail.item() == pytest.approx(math.log(2) - 30, abs=1e-5)  # one minus p would be 0


@pytest.mark.parametrize("k", [1, 7, 30, 31])
@pytest.mark.parametrize("weights", [Weights(1.0), Weights(0.7, 0.4), Weights(3.0, 1.0)])
def test_bucketed_kl_is_its_definition_in_value_and_gradient(k: int, weights: Weights):
    student, teacher = drawn_logits(0, dtype=torch.float64)
    known = top(teacher, k)
    value_C, grad_CV = measured(student, known, weights)
    student.requires_grad_()
    expected = by_definition(student, known)
    (gradient,) = torch.autograd.grad(weights.divergence * expected.sum(), student)
    torch.testing.assert_close(value_C, expected.detach())
    torch.testing.assert_close(grad_CV, gradient + weights.softmax * student.detach().softmax(-1))


@drawn(st.integers(0, 10**6), st.floats(0.0, 200.0), st.sampled_from([1, 4, 30, 31]))
def test_bucketed_kl_is_finite_never_negative_and_zero_at_equality(seed: int, scale: float, k: int):
    student, teacher = (logits * scale for logits in drawn_logits(seed))
    value_C, grad_CV = measured(student, top(teacher, k))
    assert (value_C >= 0).all()
    assert value_C.isfinite().all()
    assert grad_CV.isfinite().all()
    torch.testing.assert_close(grad_CV.sum(-1), torch.zeros(5), atol=1e-5, rtol=0)
    value_C, grad_CV = measured(student, top(student, k))
    assert value_C.eq(0).all()
    assert grad_CV.abs().max() < 1e-6


@drawn(st.integers(0, 10**6), st.integers(1, 30))
def test_bucketed_kl_grows_with_k_up_to_the_whole(seed: int, k: int):
    student, teacher = drawn_logits(seed, dtype=torch.float64)
    less, more, whole = (measured(student, top(teacher, kept))[0] for kept in (k, k + 1, 31))
    assert (less <= more + 1e-12).all()
    assert (more <= whole + 1e-12).all()


@pytest.mark.parametrize("kind", heads.KINDS_OF_HEADS)
@pytest.mark.parametrize("labels_weight", [0.0, 0.5])
def test_loss_with_every_token_known_is_the_head_loss(kind: str, labels_weight: float):
    found = []
    for loss in (lambda what: ours(what, heads.V, labels_weight=labels_weight), None):
        what = heads.given(**heads.KINDS_OF_HEADS[kind])
        result = heads.ours(what, labels_weight=labels_weight) if loss is None else loss(what)
        (3 * result.total).backward()
        found.append((result.total.detach(), result.logits, result.labels, what.gradients))
    for mine, whole in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(mine, whole)
    heads.assert_near(found[0][3], found[1][3])


@pytest.mark.parametrize("k", [1, 5])
def test_loss_is_its_definition_through_the_head_whatever_the_chunk(k: int):
    for chunk in (1, 4, heads.N, 100):
        what = heads.given(dtype=torch.float64, cap=2.0, bias=True)
        loss = ours(what, k, logits_weight=0.7, labels_weight=0.5, chunk=chunk)
        loss.total.backward()
        gradients = what.gradients
        plain = heads.given(dtype=torch.float64, cap=2.0, bias=True)
        student_NV = plain.student(plain.student_ND)
        kl = by_definition(student_NV, top(plain.teacher(plain.teacher_ND).detach(), k)).mean()
        expected = 0.7 * kl + 0.5 * torch.nn.functional.cross_entropy(student_NV, plain.targets_N)
        expected.backward()
        torch.testing.assert_close(loss.total.detach(), expected.detach())
        torch.testing.assert_close(loss.logits, kl.detach())
        heads.assert_near(gradients, plain.gradients)


class Repeatable(torch.autograd.Function):
    """Our loss for gradcheck, which runs one graph's backward pass many times: ours can be run once."""

    @staticmethod
    def forward(ctx, k, states, weight):  # type: ignore[no-untyped-def]
        states, weight = (tensor.detach().requires_grad_() for tensor in (states, weight))
        fixed = heads.given(5, 4, 11, dtype=torch.float64)
        with torch.enable_grad():
            what = heads.Given(states, Head(weight), fixed.teacher_ND, fixed.teacher, fixed.targets_N)
            total = ours(what, k, labels_weight=0.3, chunk=2).total
        ctx.save_for_backward(*torch.autograd.grad(total, (states, weight)))
        return total.detach()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return (None, *(grad * gradient for gradient in ctx.saved_tensors))


@pytest.mark.parametrize("k", [1, 3, 11])
def test_gradients_are_those_of_finite_differences(k: int):
    what = heads.given(5, 4, 11, dtype=torch.float64)
    tensors = (what.student_ND, what.student.weight_VD)
    assert torch.autograd.gradcheck(lambda *inputs: Repeatable.apply(k, *inputs), tensors)


def test_loss_over_no_tokens_is_zero_with_a_gradient():
    what = heads.given().part(slice(0, 0))
    loss = ours(what, 3, labels_weight=1.0)
    assert (loss.total.item(), loss.tokens) == (0.0, 0)
    (gradient,) = torch.autograd.grad(loss.total, what.student.weight_VD)
    assert gradient.eq(0).all()
