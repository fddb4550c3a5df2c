"""The head loss against its plain form, in value and gradient; the boundary loss as literal numbers."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lcprune.distillation.divergences import KINDS, Divergence, Kind
from lcprune.distillation.head import Head, LowRank
from lcprune.distillation.losses import boundary_loss, head_loss
from tests.distillation import heads
from tests.distillation.heads import KINDS_OF_HEADS, D, N, given, ours, plain


def test_head_loss_of_two_tokens_is_this_number():
    # Two tokens, a vocabulary of two, identity heads: logits are the states.
    student = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    eye, targets = Head(torch.eye(2)), torch.tensor([0, 0])
    loss = head_loss(student, eye, teacher, eye, targets_N=targets, labels_weight=0.5)
    # token 0: p_t = (3/4, 1/4), p_s = (1/2, 1/2); token 1 the other way round
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    second = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert loss.logits.item() == pytest.approx((first + second) / 2, abs=1e-7)
    assert loss.logits.item() == pytest.approx(0.1373265, abs=1e-6)
    assert loss.labels.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2, abs=1e-7)
    assert loss.total.item() == pytest.approx(loss.logits.item() + 0.5 * loss.labels.item(), abs=1e-7)
    assert loss.tokens == 2
    loss.total.backward()
    # (p_s - p_t) + 0.5 * (p_s - onehot), over two tokens
    expected = torch.tensor([[-0.25 - 0.25, 0.25 + 0.25], [0.25 - 0.125, -0.25 + 0.125]]) / 2
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("kind_of_head", KINDS_OF_HEADS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_head_loss_is_the_plain_one_in_value_and_gradients(kind: Kind, temperature: float, kind_of_head: str):
    for weights in ((1.0, 0.0), (0.7, 0.4)):
        settings = {"logits_weight": weights[0], "labels_weight": weights[1]}
        divergence = Divergence(kind, temperature, share=0.3)
        mine, theirs = (given(**KINDS_OF_HEADS[kind_of_head]) for _ in range(2))
        loss = ours(mine, divergence=divergence, chunk=5, **settings)
        expected = plain(theirs, divergence=divergence, **settings)
        torch.testing.assert_close(loss.total, expected)
        (3 * loss.total).backward()
        (3 * expected).backward()
        heads.assert_near(mine.gradients, theirs.gradients)


@pytest.mark.parametrize("kind_of_head", KINDS_OF_HEADS)
def test_head_loss_without_a_teacher_is_cross_entropy(kind_of_head: str):
    mine, theirs = (given(**KINDS_OF_HEADS[kind_of_head]) for _ in range(2))
    loss = ours(mine, logits_weight=0.0, labels_weight=2.0, chunk=4)
    expected = plain(theirs, logits_weight=0.0, labels_weight=2.0)
    torch.testing.assert_close(loss.total, expected)
    assert loss.logits.item() == 0
    loss.total.backward()
    expected.backward()
    heads.assert_near(mine.gradients, theirs.gradients)


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 13, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_head_loss_does_not_depend_on_the_chunk(kind: Kind, chunk: int):
    settings = {"divergence": Divergence(kind, 2.0), "labels_weight": 0.5}
    mine, whole = (given(dtype=torch.float64, **KINDS_OF_HEADS["all"]) for _ in range(2))
    loss, expected = ours(mine, chunk=chunk, **settings), ours(whole, chunk=N, **settings)
    torch.testing.assert_close(loss.total, expected.total, rtol=1e-12, atol=0)
    loss.total.backward()
    expected.total.backward()
    heads.assert_near(mine.gradients, whole.gradients, rtol=1e-10, atol=1e-13)


class Repeatable(torch.autograd.Function):
    """Our loss for gradcheck, which runs one graph's backward pass many times: ours can be run once."""

    @staticmethod
    def forward(ctx, divergence, states, weight, bias, down, up):  # type: ignore[no-untyped-def]
        tensors = [tensor.detach().requires_grad_() for tensor in (states, weight, bias, down, up)]
        states, weight, bias, down, up = tensors
        fixed = given(4, 3, 5, dtype=torch.float64, **KINDS_OF_HEADS["all"])
        student = Head(weight, bias, scale=0.5, cap=3.0, low_rank=LowRank(down, up, 0.25))
        with torch.enable_grad():
            what = heads.Given(states, student, fixed.teacher_ND, fixed.teacher, fixed.targets_N)
            total = ours(what, divergence=divergence, labels_weight=0.3, chunk=3).total
        ctx.save_for_backward(*torch.autograd.grad(total, tensors))
        return total.detach()

    @staticmethod
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        return None, *(grad_total * gradient for gradient in ctx.saved_tensors)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: Kind, temperature: float):
    wanting = given(4, 3, 5, dtype=torch.float64, **KINDS_OF_HEADS["all"]).wanting
    tensors = [wanting[name] for name in ("states", "weight", "bias", "down", "up")]
    assert torch.autograd.gradcheck(lambda *inputs: Repeatable.apply(Divergence(kind, temperature), *inputs), tensors)


@drawn(st.sampled_from(KINDS), st.integers(0, 10**6), st.floats(0.25, 4.0), st.floats(0.0, 30.0))
def test_logits_term_is_never_negative_and_zero_at_equality(kind: Kind, seed: int, temperature: float, scale: float):
    divergence, what = Divergence(kind, temperature), given(5, seed=seed)
    scaled = heads.Given(what.student_ND, what.student, what.teacher_ND * scale, what.teacher, what.targets_N)
    assert ours(scaled, divergence=divergence).logits.item() >= 0
    same = scaled.teacher_ND.clone().requires_grad_()
    equal = heads.Given(same, what.teacher, scaled.teacher_ND, what.teacher, what.targets_N)
    loss = ours(equal, divergence=divergence)
    assert 0 <= loss.logits.item() < 1e-5
    loss.total.backward()
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_head_loss_of_no_token_is_zero_with_a_zero_gradient(kind: Kind):
    what = given(0, **KINDS_OF_HEADS["all"])
    loss = ours(what, divergence=Divergence(kind), labels_weight=1.0)
    assert [loss.total.item(), loss.logits.item(), loss.labels.item(), loss.tokens] == [0, 0, 0, 0]
    loss.total.backward()
    assert what.gradients.keys() == what.wanting.keys()
    for name, tensor in what.wanting.items():
        assert what.gradients[name].equal(torch.zeros_like(tensor)), name


def test_head_loss_gives_the_teacher_no_gradient():
    what = given(**KINDS_OF_HEADS["all"])
    what.teacher_ND.requires_grad_()
    ours(what, labels_weight=1.0).total.backward()
    assert what.teacher_ND.grad is None
    assert all(tensor.grad is None for tensor in what.teacher.tensors if tensor is not None)


@pytest.mark.parametrize("frozen", ["states", "weight", "bias", "down", "up"])
def test_head_loss_trains_what_is_left_when_one_is_frozen(frozen: str):
    what, every = (given(**KINDS_OF_HEADS["all"]) for _ in range(2))
    what.wanting[frozen].requires_grad_(False)
    for tensors in (what, every):
        ours(tensors).total.backward()
    expected = every.gradients
    del expected[frozen]
    heads.assert_near(what.gradients, expected)


@pytest.mark.parametrize("parts", [(4,), (1, 2, 3, 9), (0, 12)])
def test_means_of_parts_weighted_by_their_tokens_add_up_to_the_whole(parts: tuple[int, ...]):
    settings = {"divergence": Divergence("jsd", 2.0), "labels_weight": 0.5}
    what, whole = given(), given()
    bounds = [0, *parts, N]
    for begin, end in pairwise(bounds):
        loss = ours(what.part(slice(begin, end)), **settings)
        assert loss.tokens == end - begin
        (loss.total * loss.tokens / N).backward()
    ours(whole, **settings).total.backward()
    heads.assert_near(what.gradients, whole.gradients)


@pytest.mark.parametrize("kind_of_head", KINDS_OF_HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_head_loss_under_autocast_is_near_float32(kind: Kind, kind_of_head: str):
    # 0.02 as for two products in bfloat16; the divergences themselves are float32.
    settings = {"divergence": Divergence(kind), "labels_weight": 0.5}
    mine, theirs = (given(64, 32, 97, **KINDS_OF_HEADS[kind_of_head]) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = ours(mine, chunk=10, **settings)
    exact = ours(theirs, **settings)
    assert low.total.dtype == torch.float32
    assert low.total.item() != exact.total.item()
    assert low.total.item() == pytest.approx(exact.total.item(), rel=0.01)
    for loss in (low, exact):
        loss.total.backward()
    for name, gradient in theirs.gradients.items():
        assert mine.gradients[name].dtype == torch.float32
        assert (mine.gradients[name] - gradient).norm() / gradient.norm() < 0.02, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_loss_in_low_precision_returns_gradients_of_its_inputs_dtype(dtype: torch.dtype):
    what = given(dtype=dtype, **KINDS_OF_HEADS["all"])
    ours(what, labels_weight=1.0, chunk=4).total.backward()
    assert what.gradients.keys() == what.wanting.keys()
    assert {gradient.dtype for gradient in what.gradients.values()} == {dtype}


@pytest.mark.parametrize("scale", [32768.0, 65536.0])
def test_head_loss_in_float16_neither_loses_nor_overflows_under_a_loss_scale(scale: float):
    """65,536 is where torch's GradScaler begins, and more than float16 holds."""
    chance = torch.Generator().manual_seed(0)
    teacher = torch.randn(2048, 16, generator=chance)
    student = teacher + 0.05 * torch.randn(2048, 16, generator=chance)
    weight, targets = torch.randn(64, 16, generator=chance) / 4, torch.zeros(2048, dtype=torch.long)
    gradients = []
    for dtype, factor in ((torch.float32, 1.0), (torch.float16, scale)):
        states = student.to(dtype, copy=True).requires_grad_()
        head = Head(weight.to(dtype))
        (factor * head_loss(states, head, teacher.to(dtype), head, targets_N=targets).total).backward()
        assert states.grad is not None
        gradients.append(states.grad.double() / factor)
    assert (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 0.011  # divided before it is scaled: 0.013


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor in memory of its own that an operation inside the block returned."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.numel = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[override, type-arg]
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor) and item.untyped_storage().data_ptr() not in self._known:
                self.numel = max(self.numel, item.numel())
        return result


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_head_loss_never_holds_more_logits_than_a_chunk(kind: Kind, autocast: bool):
    n, chunk, v = 64, 6, 1000
    what = given(n, D, v, **KINDS_OF_HEADS["all"])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), Largest() as largest:
        ours(what, divergence=Divergence(kind, 2.0), chunk=chunk, labels_weight=0.5).total.backward()
    assert largest.numel == max(v * D, chunk * v) == 8000
    with Largest() as largest:  # the meter can see full logits
        plain(what)
    assert largest.numel == n * v


def test_adapter_on_a_frozen_head_needs_nothing_of_the_heads_size():
    n, v, d, chunk = 64, 1000, 64, 2
    what = given(n, d, v, low_rank=True)
    what.student.weight_VD.requires_grad_(False)
    with Largest(what.student.weight_VD, what.teacher.weight_VD) as largest:
        ours(what, chunk=chunk).total.backward()
    assert what.gradients.keys() == {"states", "down", "up"}
    assert largest.numel == max(chunk * v, v * heads.R, n * d) < v * d


@pytest.mark.parametrize(("kind", "expected"), [("cosine", (1 + 0.4) / 2), ("mse", (2 + 0.8) / 2)])
def test_boundary_loss_of_two_tokens_is_this_number(kind: str, expected: float):
    student = torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    teacher = torch.tensor([[2.0, 0.0], [5.0, 0.0]])
    # cosine: 1 - 0, 1 - 15/25; mse: (4 + 4) / 4, (4 + 16) / 25
    assert boundary_loss(student, teacher, kind=kind).item() == pytest.approx(expected, abs=1e-6)  # type: ignore[arg-type]


def test_boundary_mse_is_relative_token_by_token():
    what = given(6)
    student, teacher = what.student_ND.detach(), what.teacher_ND
    scale = torch.tensor([1.0, 1e3, 1e-3, 7.0, 1.0, 50.0])[:, None]
    torch.testing.assert_close(
        boundary_loss(student * scale, teacher * scale, kind="mse"), boundary_loss(student, teacher, kind="mse")
    )


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_boundary_loss_is_zero_at_equality_and_teaches_the_student_only(kind: str):
    what = given()
    same = what.teacher_ND.clone().requires_grad_()
    assert boundary_loss(same, what.teacher_ND, kind=kind).item() == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]
    what.teacher_ND.requires_grad_()
    boundary_loss(what.student_ND, what.teacher_ND, kind=kind).backward()  # type: ignore[arg-type]
    assert what.teacher_ND.grad is None
    assert what.student_ND.grad is not None
    assert what.student_ND.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_boundary_loss_of_no_token_is_zero_with_a_zero_gradient(kind: str):
    student = torch.zeros(0, D, requires_grad=True)
    loss = boundary_loss(student, torch.zeros(0, D), kind=kind)  # type: ignore[arg-type]
    assert loss.item() == 0
    loss.backward()
    assert student.grad is not None


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_boundary_loss_of_silent_states_is_finite(kind: str):
    silent = torch.zeros(2, D, requires_grad=True)
    loss = boundary_loss(silent, torch.zeros(2, D), kind=kind)  # type: ignore[arg-type]
    loss.backward()
    assert torch.isfinite(loss)
    assert silent.grad is not None
    assert torch.isfinite(silent.grad).all()
