"""Every divergence as literal numbers, against its formula, and what all of them have in common."""

import math

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

from lcprune.distillation.divergences import KINDS, Chunk, Divergence, Kind, Weights, value_and_gradient
from tests.distillation import heads

EVERY = [Divergence(kind, share=0.1 if kind == "skew_kl" else 0.5) for kind in KINDS] + [Divergence("jsd", share=0.8)]


def measured(
    student_CV: Tensor, teacher_CV: Tensor, divergence: Divergence, weights: Weights | None = None
) -> tuple[Tensor, Tensor]:
    """Value and gradient from logits."""
    log_q, log_p = student_CV.log_softmax(-1), teacher_CV.log_softmax(-1)
    chunk = Chunk(log_q, log_p, (torch.full_like(log_q, torch.nan), torch.full_like(log_q, torch.nan)))
    return value_and_gradient(chunk, divergence, Weights(1.0) if weights is None else weights)


# p = (3/4, 1/4), q = (1/2, 1/2).  By hand:
#   skew, a = 1/2:  m = (5/8, 3/8);  3/4 log(6/5) + 1/4 log(2/3)
#   jsd, b = 1/2:   half of that and half of  1/2 log(4/5) + 1/2 log(4/3)
#   jsd, b = 1/5:   m = (11/20, 9/20);  1/5 (3/4 log(15/11) + 1/4 log(5/9)) + 4/5 (1/2 log(10/11) + 1/2 log(10/9))
@pytest.mark.parametrize(
    ("kind", "share", "value", "gradient"),
    [
        ("forward_kl", 0.5, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), -0.25),
        ("reverse_kl", 0.5, 0.5 * math.log(2 / 3) + 0.5 * math.log(2), 0.25 * math.log(1 / 3)),
        ("skew_kl", 0.5, 0.75 * math.log(1.2) + 0.25 * math.log(2 / 3), 0.5 * 0.25 * (2 / 3 - 6 / 5)),
        (
            "jsd",
            0.5,
            0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3)) + 0.25 * (math.log(0.8) + math.log(4 / 3)),
            0.5 * 0.25 * math.log(0.8 * 3 / 4),
        ),
        (
            "jsd",
            0.2,
            0.2 * (0.75 * math.log(15 / 11) + 0.25 * math.log(5 / 9)) + 0.4 * (math.log(10 / 11) + math.log(10 / 9)),
            0.8 * 0.25 * math.log(10 / 11 * 9 / 10),
        ),
    ],
)
def test_divergence_of_two_classes_is_this_number(kind: Kind, share: float, value: float, gradient: float):
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    value_C, grad_CV = measured(student, teacher, Divergence(kind, share=share))
    assert value_C.item() == pytest.approx(value, abs=1e-7)
    # of two classes the one's gain is the other's loss
    torch.testing.assert_close(grad_CV, torch.tensor([[gradient, -gradient]]))


@pytest.mark.parametrize(
    ("kind", "number"), [("forward_kl", 0.130812), ("reverse_kl", 0.143841), ("skew_kl", 0.035374), ("jsd", 0.033822)]
)
def test_divergence_of_two_classes_is_this_decimal(kind: Kind, number: float):
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    assert measured(student, teacher, Divergence(kind))[0].item() == pytest.approx(number, abs=1e-6)


@pytest.mark.parametrize("divergence", EVERY, ids=str)
@pytest.mark.parametrize("weights", [Weights(1.0), Weights(0.7, 0.4), Weights(3.0, 1.0)])
def test_divergence_is_its_formula_in_value_and_gradient(divergence: Divergence, weights: Weights):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, 19, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    value_C, grad_CV = measured(student, teacher, divergence, weights)
    student.requires_grad_()
    expected = heads.distance(student, teacher, divergence)
    (gradient,) = torch.autograd.grad(weights.divergence * expected.sum(), student)
    torch.testing.assert_close(value_C, expected.detach())
    torch.testing.assert_close(grad_CV, gradient + weights.softmax * student.detach().softmax(-1))


@drawn(st.sampled_from(EVERY), st.integers(0, 10**6), st.floats(0.0, 200.0))
def test_divergence_is_finite_never_negative_and_zero_at_equality(divergence: Divergence, seed: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(5, 31, generator=generator) * scale for _ in range(2))
    value_C, grad_CV = measured(student, teacher, divergence)
    assert (value_C >= 0).all()
    assert value_C.isfinite().all()
    assert grad_CV.isfinite().all()
    torch.testing.assert_close(grad_CV.sum(-1), torch.zeros(5), atol=1e-4 + 1e-6 * scale, rtol=0)
    value_C, grad_CV = measured(student, student, divergence)
    assert value_C.eq(0).all()
    assert grad_CV.abs().max() < 1e-6


@drawn(st.integers(0, 10**6), st.floats(0.0, 100.0))
def test_skew_kl_and_jsd_are_bounded_where_forward_kl_is_not(seed: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(5, 31, generator=generator) * scale for _ in range(2))
    assert measured(student, teacher, Divergence("skew_kl", share=0.1))[0].max() <= math.log(10) + 1e-5
    assert measured(student, teacher, Divergence("jsd"))[0].max() <= math.log(2) + 1e-5


def test_jsd_is_symmetric_at_one_half():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 31, generator=generator) for _ in range(2))
    jsd = Divergence("jsd")
    torch.testing.assert_close(measured(student, teacher, jsd)[0], measured(teacher, student, jsd)[0])


def test_small_shares_lead_to_forward_kl():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 31, generator=generator, dtype=torch.float64) for _ in range(2))
    value_C, grad_CV = measured(student, teacher, Divergence("forward_kl"))
    skew_C, skew_CV = measured(student, teacher, Divergence("skew_kl", share=1e-7))
    jsd_C, jsd_CV = measured(student, teacher, Divergence("jsd", share=1e-7))
    torch.testing.assert_close((skew_C, skew_CV), (value_C, grad_CV), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((jsd_C / 1e-7, jsd_CV / 1e-7), (value_C, grad_CV), atol=1e-5, rtol=1e-5)
