"""The kernel per token against divergences.py, and the whole loss with it against the one without; on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lcprune.distillation import fused
from lcprune.distillation.divergences import KINDS, Chunk, Divergence, Kind, Weights, value_and_gradient
from lcprune.distillation.head import Head, LowRank
from lcprune.distillation.losses import head_loss

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # TRITON_INTERPRET=1 computes on a CPU
C, D, V = 7, 32, 5003


def _logits(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(C, V, generator=torch.Generator().manual_seed(seed)).mul_(3).to(DEVICE, dtype)


@pytest.mark.parametrize("labels", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_is_the_formula_in_value_and_gradient(kind: Kind, dtype: torch.dtype, temperature: float, labels: float):
    rows = pytest.importorskip("lcprune.distillation.rows")
    student_CV, teacher_CV = _logits(0, dtype), _logits(1, dtype)
    teacher_CV[0] = student_CV[0]  # a token at which both agree
    targets_C = torch.arange(C, device=DEVICE) * 700
    log_q, log_p = ((each.double() / temperature).log_softmax(-1) for each in (student_CV, teacher_CV))
    nats = cross_entropy(student_CV.double() / temperature, targets_C, reduction="none")
    divergence, weights = Divergence(kind, temperature, share=0.3), Weights(0.7, labels)
    free = torch.empty_like(log_q), torch.empty_like(log_q)
    expected, gradient = value_and_gradient(Chunk(log_q, log_p, free), divergence, weights)
    gradient[torch.arange(C), targets_C] -= labels
    value_C, nats_C = rows.value_and_gradient(student_CV, teacher_CV, targets_C, divergence, weights)
    torch.testing.assert_close(value_C.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nats_C.double(), nats, rtol=1e-4, atol=1e-5)
    near = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(student_CV.double(), gradient, rtol=near, atol=1e-6)
    assert value_C[0].item() == pytest.approx(0, abs=1e-6)


def test_tokens_that_are_certain_have_finite_values_and_gradients():
    rows = pytest.importorskip("lcprune.distillation.rows")
    for kind in KINDS:
        student_CV, teacher_CV = torch.zeros(2, 2, V, device=DEVICE)
        student_CV[0, 3] = teacher_CV[0, 5] = student_CV[1, 3] = teacher_CV[1, 3] = 1e4
        targets_C = torch.tensor([5, 3], device=DEVICE)
        value_C, _ = rows.value_and_gradient(student_CV, teacher_CV, targets_C, Divergence(kind), Weights(1.0, 1.0))
        assert value_C.isfinite().all()
        assert value_C[1].item() == 0
        assert student_CV.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_not_hidden(kind: Kind, wrong: float):
    rows = pytest.importorskip("lcprune.distillation.rows")
    for side in (0, 1):
        both = torch.stack([_logits(0, torch.float32), _logits(1, torch.float32)])
        both[side, 2, 100] = wrong
        targets_C = torch.zeros(C, dtype=torch.long, device=DEVICE)
        value_C, _ = rows.value_and_gradient(both[0], both[1], targets_C, Divergence(kind), Weights(1.0))
        assert value_C.isnan().tolist() == [row == 2 for row in range(C)]


def test_targets_are_read_where_they_are_and_one_outside_is_no_number():
    rows = pytest.importorskip("lcprune.distillation.rows")
    student_CV, targets = _logits(0, torch.float32), torch.arange(2 * C, device=DEVICE).view(C, 2) * 300
    expected = cross_entropy(student_CV, targets[:, 1], reduction="none")
    targets[3, 1] = -100
    _, nats_C = rows.value_and_gradient(
        student_CV, _logits(1, torch.float32), targets[:, 1], Divergence(), Weights(1.0)
    )
    assert nats_C.isnan().tolist() == [row == 3 for row in range(C)]
    torch.testing.assert_close(nats_C[:3], expected[:3])


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"cap": 5.0, "scale": 0.5},
    "bias": {"bias": True},
    "adapter": {"rank": 4},
}


def _loss(head: str, kind: Kind, dtype: torch.dtype, **settings: object) -> list[Tensor]:
    chance = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance).to(DEVICE).requires_grad_()

    options = dict(HEADS[head])
    states, weight, theirs, their_weight = draw(40, D), draw(V, D), draw(40, D).detach(), draw(V, D).detach()
    bias = draw(V) if options.pop("bias", False) else None
    adapter = LowRank(draw(4, D), draw(V, 4), 0.1) if options.pop("rank", 0) else None
    mine = Head(weight, bias, low_rank=adapter, **options)
    other = Head(their_weight, None if bias is None else bias.detach(), **options)
    trained = [states, *(each for each in mine.tensors if each is not None)]
    targets = torch.arange(40, device=DEVICE) * 100
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        loss = head_loss(
            states, mine, theirs, other, targets_N=targets, divergence=Divergence(kind), chunk=16, **settings
        )
    (2 * loss.total).backward()
    return [loss.total.detach(), loss.logits, loss.labels, *(each.grad for each in trained)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_with_the_kernel_is_the_loss_without(
    head: str, kind: Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("triton")
    found = []
    for by_rows in (True, False):
        monkeypatch.setattr(fused, "computes_by_rows", lambda *_, by_rows=by_rows: by_rows)
        found.append(_loss(head, kind, dtype, labels_weight=0.5))
    near = 1e-4 if dtype == torch.float32 else 2e-2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near * float(other.abs().max()))


def test_kernel_is_what_a_gpu_computes_with():
    full = fused.Full(torch.ones(1, 1), Head(torch.ones(1, 1)))
    usual = fused.Settings(Divergence(temperature=2.0), 1.0, 0.0, 16, torch.bfloat16)
    assert fused.computes_by_rows(torch.device("cuda"), full, usual)
    assert not fused.computes_by_rows(torch.device("cpu"), full, usual)
