"""Random states and heads of every kind, and the plain form of the head loss that ours has to equal.

Shared by the tests of divergences, head and losses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lcprune.distillation.divergences import Divergence
from lcprune.distillation.head import Head, LowRank
from lcprune.distillation.losses import HeadLoss, head_loss

N, D, V, R = 13, 8, 31, 3

KINDS_OF_HEADS: dict[str, dict[str, float]] = {
    "plain": {},
    "bias": {"bias": True},
    "cap": {"cap": 2.0},
    "scale": {"scale": 0.25},
    "low rank": {"low_rank": True},
    "all": {"bias": True, "cap": 3.0, "scale": 0.5, "low_rank": True},
}


def head(seed: int, v: int = V, d: int = D, *, dtype: torch.dtype = torch.float32, **kind: float) -> Head:
    """A random head that wants gradients, with what `kind` names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    return Head(
        draw(v, d),
        draw(v) if kind.get("bias") else None,
        scale=kind.get("scale", 1.0),
        cap=kind.get("cap"),
        low_rank=LowRank(draw(R, d), draw(v, R), 0.25) if kind.get("low_rank") else None,
    )


@dataclass(frozen=True)
class Given:
    """What a head loss is given."""

    student_ND: Tensor
    student: Head
    teacher_ND: Tensor
    teacher: Head
    targets_N: Tensor

    @property
    def wanting(self) -> dict[str, Tensor]:
        """The student's tensors, by name."""
        names = ("weight", "bias", "down", "up")
        tensors = dict(zip(names, self.student.tensors, strict=True)) | {"states": self.student_ND}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def gradients(self) -> dict[str, Tensor]:
        """What the student's tensors have got."""
        return {name: tensor.grad for name, tensor in self.wanting.items() if tensor.grad is not None}

    def part(self, rows: slice) -> "Given":
        """Some of the tokens, under the same heads."""
        return Given(self.student_ND[rows], self.student, self.teacher_ND[rows], self.teacher, self.targets_N[rows])


def given(
    n: int = N, d: int = D, v: int = V, *, seed: int = 0, dtype: torch.dtype = torch.float32, **kind: float
) -> Given:
    """Always the same for the same arguments; the teacher's head is of the same kind as the student's."""
    generator = torch.Generator().manual_seed(seed)
    student_ND, teacher_ND = (torch.randn(n, d, generator=generator).to(dtype) for _ in range(2))
    return Given(
        student_ND.requires_grad_(),
        head(seed + 1, v, d, dtype=dtype, **kind),
        teacher_ND,
        head(seed + 2, v, d, dtype=dtype, **kind),
        torch.randint(v, (n,), generator=generator),
    )


def ours(what: Given, *, divergence: Divergence | None = None, **settings: float) -> HeadLoss:
    """`head_loss`."""
    return head_loss(
        what.student_ND,
        what.student,
        what.teacher_ND,
        what.teacher,
        targets_N=what.targets_N,
        divergence=divergence,
        **settings,  # type: ignore[arg-type]
    )


def plain(
    what: Given, *, divergence: Divergence | None = None, logits_weight: float = 1.0, labels_weight: float = 0.0
) -> Tensor:
    """The definition, over full logits, for autograd."""
    divergence = Divergence() if divergence is None else divergence
    student_NV, teacher_NV = what.student(what.student_ND), what.teacher(what.teacher_ND).detach()
    distance_N = distance(student_NV, teacher_NV, divergence) * divergence.temperature**2
    return logits_weight * distance_N.mean() + labels_weight * cross_entropy(student_NV, what.targets_N)


def distance(student_NV: Tensor, teacher_NV: Tensor, divergence: Divergence) -> Tensor:
    """The divergence [N] of softened logits, as its formula is written in the papers."""
    q, p = ((logits / divergence.temperature).softmax(-1) for logits in (student_NV, teacher_NV))
    mixture = divergence.share * p + (1 - divergence.share) * q

    def kl(left: Tensor, right: Tensor) -> Tensor:
        return (left * (left / right).log()).sum(-1)

    if divergence.kind == "jsd":
        return divergence.share * kl(p, mixture) + (1 - divergence.share) * kl(q, mixture)
    return {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "skew_kl": kl(p, mixture)}[divergence.kind]


def assert_near(left: Mapping[str, Tensor], right: Mapping[str, Tensor], **tolerance: float) -> None:
    """Fails unless both have the same tensors of the same values."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
