"""The head loss against torch's own, in value and gradient; the boundary loss as literal numbers."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from lcprune.distillation.losses import HeadLoss, boundary_loss, head_loss

N, D, V = 13, 8, 31


def operands(
    n: int = N, d: int = D, v: int = V, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random states and heads for `head_loss`; the student's want gradients."""
    generator = torch.Generator().manual_seed(seed)
    draw = {
        name: torch.randn(rows, d, generator=generator).to(dtype)
        for name, rows in {"student_ND": n, "student_VD": v, "teacher_ND": n, "teacher_VD": v}.items()
    }
    draw["student_ND"].requires_grad_()
    draw["student_VD"].requires_grad_()
    return {**draw, "targets_N": torch.randint(v, (n,), generator=generator)}


def chunked(given: dict[str, Tensor], **settings: float) -> HeadLoss:
    tensors = dict(given)
    targets = tensors.pop("targets_N")
    return head_loss(*tensors.values(), targets_N=targets, **settings)  # type: ignore[arg-type]


def plain(given: dict[str, Tensor], *, logits_weight: float, labels_weight: float, temperature: float) -> Tensor:
    student_NV = given["student_ND"] @ given["student_VD"].t()
    teacher_NV = given["teacher_ND"] @ given["teacher_VD"].t()
    log_s, log_t = ((logits / temperature).log_softmax(-1) for logits in (student_NV, teacher_NV))
    kl = kl_div(log_s, log_t, log_target=True, reduction="batchmean") * temperature**2
    return logits_weight * kl + labels_weight * cross_entropy(student_NV, given["targets_N"])


def test_head_loss_of_two_tokens_is_this_number():
    # Two tokens, a vocabulary of two, identity heads: logits are the states.
    student = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    eye, targets = torch.eye(2), torch.tensor([0, 0])
    loss = head_loss(student, eye, teacher, eye, targets_N=targets, labels_weight=0.5)
    # token 0: p_t = (3/4, 1/4), p_s = (1/2, 1/2); token 1 the other way round
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    second = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert loss.logits.item() == pytest.approx((first + second) / 2, abs=1e-7)
    assert loss.logits.item() == pytest.approx(0.1373265, abs=1e-6)
    assert loss.labels.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2, abs=1e-7)
    assert loss.total.item() == pytest.approx(loss.logits.item() + 0.5 * loss.labels.item(), abs=1e-7)
    loss.total.backward()
    # (p_s - p_t) + 0.5 * (p_s - onehot), over two tokens
    expected = torch.tensor([[-0.25 - 0.25, 0.25 + 0.25], [0.25 - 0.125, -0.25 + 0.125]]) / 2
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 256])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)])
def test_head_loss_is_the_plain_one_in_value_and_gradients(
    chunk: int, temperature: float, weights: tuple[float, float]
):
    settings = {"logits_weight": weights[0], "labels_weight": weights[1], "temperature": temperature}
    ours, theirs = operands(), operands()
    loss, expected = chunked(ours, chunk=chunk, **settings), plain(theirs, **settings)
    torch.testing.assert_close(loss.total, expected)
    (3 * loss.total).backward()
    (3 * expected).backward()
    for name in ("student_ND", "student_VD"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, msg=name)


@given(st.integers(0, 10**6), st.floats(0.25, 4.0), st.floats(0.0, 30.0))
def test_forward_kl_is_never_negative_and_zero_at_equality(seed: int, temperature: float, scale: float):
    given_ = operands(5, seed=seed)
    given_["teacher_ND"] *= scale
    assert chunked(given_, temperature=temperature).logits.item() >= 0
    given_ |= {"student_ND": given_["teacher_ND"].clone().requires_grad_(), "student_VD": given_["teacher_VD"].clone()}
    loss = chunked(given_, temperature=temperature)
    assert 0 <= loss.logits.item() < 1e-5
    loss.total.backward()
    assert given_["student_ND"].grad is not None
    assert given_["student_ND"].grad.abs().max() < 1e-5


def test_head_loss_of_no_token_is_zero_with_a_zero_gradient():
    given_ = operands(0)
    loss = chunked(given_, labels_weight=1.0)
    assert [loss.total.item(), loss.logits.item(), loss.labels.item()] == [0, 0, 0]
    loss.total.backward()
    assert given_["student_VD"].grad is not None
    assert given_["student_VD"].grad.equal(torch.zeros(V, D))
    assert given_["student_ND"].grad is not None
    assert given_["student_ND"].grad.shape == (0, D)


def test_head_loss_gives_the_teacher_no_gradient():
    given_ = operands()
    given_["teacher_ND"].requires_grad_()
    given_["teacher_VD"].requires_grad_()
    chunked(given_, labels_weight=1.0).total.backward()
    assert given_["teacher_ND"].grad is None
    assert given_["teacher_VD"].grad is None


@pytest.mark.parametrize("frozen", ["student_ND", "student_VD"])
def test_head_loss_trains_what_is_left_when_the_other_is_frozen(frozen: str):
    given_, both = operands(), operands()
    given_[frozen].requires_grad_(False)
    for tensors in (given_, both):
        chunked(tensors).total.backward()
    assert given_[frozen].grad is None
    other = "student_VD" if frozen == "student_ND" else "student_ND"
    torch.testing.assert_close(given_[other].grad, both[other].grad)


def test_head_loss_of_parts_of_a_whole_adds_up_to_it():
    given_ = operands()
    whole = chunked(given_, labels_weight=0.5).total
    rows = {"student_ND", "teacher_ND", "targets_N"}
    parts = [
        {name: tensor[part] if name in rows else tensor for name, tensor in given_.items()}
        for part in (slice(0, 4), slice(4, N))
    ]
    total = sum(chunked(part, labels_weight=0.5).total * len(part["targets_N"]) / N for part in parts)
    torch.testing.assert_close(total, whole)


def test_head_loss_under_autocast_is_near_float32():
    ours, theirs = operands(64, 32, 97), operands(64, 32, 97)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = chunked(ours, chunk=10, labels_weight=0.5)
    exact = chunked(theirs, labels_weight=0.5)
    assert low.total.dtype == torch.float32
    assert low.total.item() != exact.total.item()
    assert low.total.item() == pytest.approx(exact.total.item(), rel=0.01)
    for tensors, loss in ((ours, low), (theirs, exact)):
        loss.total.backward()
        assert tensors["student_ND"].grad is not None
        assert tensors["student_ND"].grad.dtype == torch.float32
    for name in ("student_ND", "student_VD"):
        difference = (ours[name].grad - theirs[name].grad).norm() / theirs[name].grad.norm()  # type: ignore[union-attr]
        assert difference < 0.02, name


def test_head_loss_in_bfloat16_returns_gradients_of_its_inputs_dtype():
    given_ = operands(dtype=torch.bfloat16)
    chunked(given_, labels_weight=1.0).total.backward()
    assert given_["student_ND"].grad is not None
    assert given_["student_VD"].grad is not None
    assert given_["student_ND"].grad.dtype == given_["student_VD"].grad.dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had which an operation inside the block returned."""

    numel = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[override, type-arg]
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.numel())
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_head_loss_never_holds_more_logits_than_a_chunk(autocast: bool):
    n, chunk, v = 64, 6, 1000
    given_ = operands(n, D, v)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), Largest() as largest:
        chunked(given_, chunk=chunk, labels_weight=0.5, temperature=2.0).total.backward()
    assert largest.numel == max(v * D, chunk * v) == 8000
    with Largest() as largest:  # the meter can see full logits
        plain(given_, logits_weight=1.0, labels_weight=0.0, temperature=1.0)
    assert largest.numel == n * v


@pytest.mark.parametrize(("kind", "expected"), [("cosine", (1 + 0.4) / 2), ("mse", (2 + 0.8) / 2)])
def test_boundary_loss_of_two_tokens_is_this_number(kind: str, expected: float):
    student = torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    teacher = torch.tensor([[2.0, 0.0], [5.0, 0.0]])
    # cosine: 1 - 0, 1 - 15/25; mse: (4 + 4) / 4, (4 + 16) / 25
    assert boundary_loss(student, teacher, kind=kind).item() == pytest.approx(expected, abs=1e-6)  # type: ignore[arg-type]


def test_boundary_mse_is_relative_token_by_token():
    given_ = operands(6)
    student, teacher = given_["student_ND"].detach(), given_["teacher_ND"]
    scale = torch.tensor([1.0, 1e3, 1e-3, 7.0, 1.0, 50.0])[:, None]
    torch.testing.assert_close(
        boundary_loss(student * scale, teacher * scale, kind="mse"), boundary_loss(student, teacher, kind="mse")
    )


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_boundary_loss_is_zero_at_equality_and_teaches_the_student_only(kind: str):
    given_ = operands()
    same = given_["teacher_ND"].clone().requires_grad_()
    assert boundary_loss(same, given_["teacher_ND"], kind=kind).item() == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]
    given_["teacher_ND"].requires_grad_()
    boundary_loss(given_["student_ND"], given_["teacher_ND"], kind=kind).backward()  # type: ignore[arg-type]
    assert given_["teacher_ND"].grad is None
    assert given_["student_ND"].grad is not None
    assert given_["student_ND"].grad.abs().sum() > 0


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
