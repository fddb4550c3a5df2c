"""From last states to a loss without full logits: the output head and the loss in one.

`fused` walks over chunks of tokens and takes the gradient of each on the way, so that memory does not grow with the
number of tokens and nothing is computed twice. What is frozen gets no buffer: with a trained adapter on a frozen head
nothing of the head's size is held beside it. Legend: `N` tokens, `C` tokens of a chunk, `D` hidden, `V` vocabulary,
`R` rank of an adapter.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lcprune.distillation import buckets
from lcprune.distillation.buckets import Buckets
from lcprune.distillation.divergences import Chunk, Divergence, Weights, value_and_gradient
from lcprune.distillation.head import Head

CHUNK = 256
"""Tokens whose logits exist at once; on CPUs 256 is as fast as 512 and 1024, and 128 is slower."""
ROWS_CHUNK = 1024
"""The same by rows.py on GPUs: it needs fewer buffers, and every chunk costs a pass over the gradient of W."""
_ADDS_WIDER = "dtype_out" in torch.ops.aten.addmm.overloads()
"""Whether this torch adds products of 16 bits to sums of 32 without a temporary, as it does on CUDA from 2.8 on."""


@dataclass(frozen=True)
class Settings:
    """What `fused` computes, and in what."""

    divergence: Divergence
    """The term that the teacher teaches."""
    divergence_weight: float
    """Its factor; 0 = the teacher's logits are not even computed."""
    labels_weight: float
    """Factor of the cross-entropy."""
    chunk: int | None
    """C; memory is proportional to C * V; None = ROWS_CHUNK where rows.py computes, else CHUNK."""
    dtype: torch.dtype
    """What the matrix products are computed in; all else is float32, or float64 where this is."""


@dataclass(frozen=True, eq=False)
class Full:
    """A teacher whose whole distribution is computed, chunk by chunk."""

    states_ND: Tensor
    """Its last states."""
    head: Head
    """What makes logits of them."""


def fused(
    student_ND: Tensor, student: Head, teacher: Full | Buckets, targets_N: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum, divergence and cross-entropy, means over the N tokens; only the weighted sum has a gradient."""
    with torch.autocast(student_ND.device.type, enabled=False):
        return _FusedHead.apply(student_ND, *student.tensors, student, teacher, targets_N, settings)


def computes_by_rows(device: torch.device, teacher: Full | Buckets, settings: Settings) -> bool:
    """Whether one kernel per token makes value and gradient (rows.py), instead of operations on whole chunks."""
    apart = settings.labels_weight != 0 and settings.divergence.temperature != 1  # two softmaxes of the same logits
    known = isinstance(teacher, Full) and settings.divergence_weight != 0 and settings.dtype != torch.float64
    return device.type == "cuda" and known and not apart and _has_kernel(device)


@cache
def _has_kernel(device: torch.device) -> bool:
    """Whether Triton is there and runs on this device: it needs a compiler for C, and a card that is not too old."""
    if find_spec("triton") is None:
        return False
    try:
        from lcprune.distillation import rows

        both = torch.zeros((2, 1, 2), device=device)
        targets = torch.zeros(1, dtype=torch.long, device=device)
        value_C, _ = rows.value_and_gradient(both[0], both[1], targets, Divergence(), Weights(1))
        return value_C.item() == 0
    except Exception as error:  # whatever a compiler, a driver or a card says
        warnings.warn(
            f"Triton does not run on this GPU ({type(error).__name__}: {error}): the loss is computed by torch's "
            "operations, slower and with more memory",
            stacklevel=2,
        )
        return False


class _FusedHead(torch.autograd.Function):
    """Loss and gradient chunk by chunk; `backward` only scales what `forward` has computed."""

    @staticmethod
    def forward(ctx, student_ND, weight, bias, down, up, student, teacher, targets_N, settings):  # type: ignore[no-untyped-def]
        student_low, teacher = student.detach().to(settings.dtype), _in(settings.dtype, teacher)
        by_rows = computes_by_rows(student_ND.device, teacher, settings)
        make_logits, taught = (_Scratch.product, _row_by_row) if by_rows else (_Scratch.logits, _taught)
        chunk = settings.chunk or (ROWS_CHUNK if by_rows else CHUNK)
        scratch = _Scratch(min(chunk, max(len(targets_N), 1)), student.weight_VD, settings.dtype)
        gradients = _Gradients(student_ND, student_low, ctx.needs_input_grad[:5], scratch.dtype)
        teach = torch.zeros((), dtype=scratch.dtype, device=student_ND.device)
        ce = torch.zeros_like(teach)
        for begin in range(0, len(targets_N), chunk):
            part = slice(begin, begin + chunk)
            states_CD = student_ND[part].to(settings.dtype)
            logits_CV = make_logits(scratch, 0, states_CD, student_low)
            slope_CV = scratch.slope(logits_CV, student.cap)
            if settings.divergence_weight:
                chunk_teach, chunk_ce, grad_CV = taught(logits_CV, teacher, part, targets_N[part], settings, scratch)
                teach += chunk_teach
            else:
                chunk_ce, grad_CV = _cross_entropy(logits_CV, targets_N[part], settings.labels_weight, scratch)
            ce += chunk_ce
            if slope_CV is not None:
                grad_CV *= slope_CV
            gradients.add(part, grad_CV, states_CD)
        divisor = float(max(len(targets_N), 1))
        # Only here, after the products: before, float16 would lose the small entries.
        ctx.save_for_backward(*gradients.times(student.scale / divisor))
        ctx.dtypes = [None if given is None else given.dtype for given in (student_ND, weight, bias, down, up)]
        teach, ce = teach / divisor, ce / divisor
        ctx.mark_non_differentiable(teach, ce)
        return settings.divergence_weight * teach + settings.labels_weight * ce, teach, ce

    @staticmethod
    def backward(ctx, grad_total, *_):  # type: ignore[no-untyped-def]
        # In place: nobody else holds them, and another [V, D] would cost more than the multiplication.
        scaled = [
            None if gradient is None else gradient.mul_(grad_total.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


class _Gradients:
    """Gradients of states, W, b, A and B, summed over chunks without the head's scale; None for what is frozen."""

    def __init__(self, states_ND: Tensor, head: Head, needed: tuple[bool, ...], dtype: torch.dtype) -> None:
        self._head = head
        # The mean over tokens and the loss scale, which make up for one another, come one after the other: float16
        # would lose one to zero and the other to infinity.
        wide = torch.float32 if states_ND.dtype == torch.float16 else states_ND.dtype
        self._states = torch.empty_like(states_ND, dtype=wide) if needed[0] else None
        self._sums = [
            torch.empty_like(tensor, dtype=dtype) if tensor is not None and need else None
            for tensor, need in zip(head.tensors, needed[1:], strict=True)
        ]
        self._filled = False

    def add(self, part: slice, grad_CV: Tensor, states_CD: Tensor) -> None:
        """Takes in one chunk: the gradient of its logits before the scale, and its states."""
        weight, bias, down, up = self._sums
        if bias is not None:
            self._add(bias[None], torch.ones_like(grad_CV[:, :1]).t(), grad_CV)
        grad_CV = grad_CV.to(states_CD.dtype)
        self._add(weight, grad_CV.t(), states_CD)
        if self._states is not None:
            self._states[part] = grad_CV @ self._head.weight_VD
        adapter = self._head.low_rank
        if adapter is not None:
            self._add(up, grad_CV.t(), (states_CD @ adapter.down_RD.t()).mul_(adapter.scaling))
            grad_CR = (grad_CV @ adapter.up_VR).mul_(adapter.scaling)
            self._add(down, grad_CR.t(), states_CD)
            if self._states is not None:
                self._states[part] += grad_CR @ adapter.down_RD
        self._filled = True

    def times(self, factor: float) -> list[Tensor | None]:
        """All gradients times a factor, in place; 0 if there was no chunk."""
        return [
            gradient if gradient is None else gradient.mul_(factor) if self._filled else gradient.zero_()
            for gradient in (self._states, *self._sums)
        ]

    def _add(self, total: Tensor | None, left: Tensor, right: Tensor) -> None:
        """Adds left right to a sum; without a temporary where the dtypes allow it."""
        if total is None:
            return
        if left.dtype == total.dtype:
            total.addmm_(left, right, beta=int(self._filled))
        elif total.is_cuda and _ADDS_WIDER and total.dtype == torch.float32:
            torch.addmm(total, left, right, beta=int(self._filled), out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
        elif self._filled:
            total += left @ right
        else:
            total.copy_(left @ right)


class _Scratch:
    """Buffers [C, V] that every chunk uses again, made when they are first asked for.

    0 and 1 hold the logits of student and teacher, 2 and 3 what is made of them, 4 the slope of a soft cap, 5 the
    gradient of a cross-entropy whose temperature is not the divergence's, -1 a product on its way to float32. On CPUs
    fresh pages for every temporary cost more than the arithmetic on them.
    """

    def __init__(self, chunk: int, head_VD: Tensor, compute: torch.dtype) -> None:
        self.dtype = torch.promote_types(compute, torch.float32)
        self._shape, self._device = (chunk, len(head_VD)), head_VD.device
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}
        self._compute = compute

    def empty(self, index: int, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """The first rows of a buffer, with whatever they hold; one for every dtype that is asked for."""
        key = index, self.dtype if dtype is None else dtype
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self._shape, dtype=key[1], device=self._device)
        return self._buffers[key][:rows]

    def product(self, index: int, states_CD: Tensor, head: Head) -> Tensor:
        """Logits [C, V] in the products' dtype where the head is a product and nothing else; otherwise as `logits`."""
        if not head.is_product:
            return self.logits(index, states_CD, head)
        return torch.mm(states_CD, head.weight_VD.t(), out=self.empty(index, len(states_CD), self._compute))

    def logits(self, index: int, states_CD: Tensor, head: Head) -> Tensor:
        """Logits [C, V] in a buffer; products in the dtype of the states, sums in float32."""
        out_CV = self.empty(index, len(states_CD))
        self._multiply(out_CV, states_CD, head.weight_VD)
        if head.low_rank is not None:
            low_CR = states_CD @ head.low_rank.down_RD.t()
            self._multiply(out_CV, low_CR, head.low_rank.up_VR, add=head.low_rank.scaling)
        if head.bias_V is not None:
            out_CV += head.bias_V
        if head.scale != 1:
            out_CV *= head.scale
        return out_CV if head.cap is None else out_CV.div_(head.cap).tanh_().mul_(head.cap)

    def slope(self, logits_CV: Tensor, cap: float | None) -> Tensor | None:
        """The derivative 1 - (z / cap)**2 of capped logits; None without a cap, where it is 1."""
        if cap is None:
            return None
        slope_CV = torch.mul(logits_CV, logits_CV, out=self.empty(4, len(logits_CV)))
        return slope_CV.mul_(-1 / cap**2).add_(1)

    def _multiply(self, out_CV: Tensor, left: Tensor, right: Tensor, *, add: float | None = None) -> None:
        """Out = left right^T, or out += add * left right^T."""
        if self._compute == self.dtype:
            torch.addmm(
                out_CV, left, right.t(), beta=0 if add is None else 1, alpha=1 if add is None else add, out=out_CV
            )
            return
        product_CV = torch.mm(left, right.t(), out=self.empty(-1, len(left), self._compute))
        out_CV.copy_(product_CV) if add is None else out_CV.add_(product_CV, alpha=add)


def _in(dtype: torch.dtype, teacher: Full | Buckets) -> Full | Buckets:
    return teacher if isinstance(teacher, Buckets) else Full(teacher.states_ND, teacher.head.detach().to(dtype))


def _row_by_row(
    logits_CV: Tensor, teacher: Full, part: slice, targets_C: Tensor, settings: Settings, scratch: _Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_taught`, by a kernel per token; the gradient replaces the logits."""
    from lcprune.distillation import rows  # triton comes with torch for GPUs alone

    teacher_CV = scratch.product(1, teacher.states_ND[part].to(settings.dtype), teacher.head)
    temperature = settings.divergence.temperature
    weights = Weights(settings.divergence_weight * temperature, settings.labels_weight)
    value_C, nats_C = rows.value_and_gradient(logits_CV, teacher_CV, targets_C, settings.divergence, weights)
    ce = nats_C.sum() if settings.labels_weight else torch.zeros_like(value_C[0])
    return value_C.sum() * temperature**2, ce, logits_CV


def _taught(
    logits_CV: Tensor, teacher: Full | Buckets, part: slice, targets_C: Tensor, settings: Settings, scratch: _Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of divergences and of cross-entropies, and the gradient of the weighted sum, of the tokens of a chunk."""
    if isinstance(teacher, Buckets):
        return _bucketed(logits_CV, teacher[part], targets_C, settings, scratch)
    teacher_CV = scratch.logits(1, teacher.states_ND[part].to(settings.dtype), teacher.head)
    return _both(logits_CV, teacher_CV, targets_C, settings, scratch)


def _bucketed(
    logits_CV: Tensor, teacher: Buckets, targets_C: Tensor, settings: Settings, scratch: _Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_both`, from the teacher's likeliest tokens; buffers 0 and 2 are used up, the others not even made."""
    assert settings.divergence == Divergence(), "only forward KL at temperature 1 can be had from buckets"
    log_q = torch.log_softmax(logits_CV, -1, out=scratch.empty(2, len(logits_CV)))
    ce = _nats(log_q, targets_C) if settings.labels_weight else torch.zeros_like(log_q[0, 0])
    value_C, grad_CV = buckets.value_and_gradient(
        log_q, teacher, Weights(settings.divergence_weight, settings.labels_weight), out_CV=logits_CV
    )
    if settings.labels_weight:
        _subtract_at(grad_CV, targets_C, settings.labels_weight)
    return value_C.sum(), ce, grad_CV


def _both(
    logits_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor, settings: Settings, scratch: _Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of temperature**2 * divergence and of cross-entropies, and the gradient of the weighted sum.

    d/dz of temperature**2 * D(z / temperature) is temperature * D'. Buffers 0 to 3 are used up.
    """
    rows, temperature = len(logits_CV), settings.divergence.temperature
    ce = torch.zeros((), dtype=scratch.dtype, device=logits_CV.device)
    apart = bool(settings.labels_weight) and temperature != 1
    if apart:
        # Another softmax, at temperature 1; buffers 2 and 3 are free again when its gradient lies in a third.
        ce, hard_CV = _cross_entropy(logits_CV, targets_C, settings.labels_weight, scratch)
        scratch.empty(5, rows).copy_(hard_CV)
    if temperature != 1:
        logits_CV /= temperature
        teacher_CV /= temperature
    log_q = torch.log_softmax(logits_CV, -1, out=scratch.empty(2, rows))
    log_p = torch.log_softmax(teacher_CV, -1, out=scratch.empty(3, rows))
    together = settings.labels_weight if not apart else 0.0
    if together:
        ce = _nats(log_q, targets_C)
    value_C, grad_CV = value_and_gradient(
        Chunk(log_q, log_p, (logits_CV, teacher_CV)),
        settings.divergence,
        Weights(settings.divergence_weight * temperature, together),
    )
    if together:
        _subtract_at(grad_CV, targets_C, together)
    if apart:
        grad_CV += scratch.empty(5, rows)
    return value_C.sum() * temperature**2, ce, grad_CV


def _cross_entropy(logits_CV: Tensor, targets_C: Tensor, weight: float, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies and weight * (softmax - onehot), in buffers 2 and 3; the logits stay."""
    log_q = torch.log_softmax(logits_CV, -1, out=scratch.empty(2, len(logits_CV)))
    grad_CV = torch.exp(log_q, out=scratch.empty(3, len(logits_CV))).mul_(weight)
    _subtract_at(grad_CV, targets_C, weight)
    return _nats(log_q, targets_C), grad_CV


def _nats(log_q_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Sum of -log q(target)."""
    return -log_q_CV.gather(1, targets_C[:, None]).sum()


def _subtract_at(grad_CV: Tensor, targets_C: Tensor, weight: float) -> None:
    at = targets_C[:, None]
    grad_CV.scatter_add_(1, at, torch.full_like(at, -weight, dtype=grad_CV.dtype))
