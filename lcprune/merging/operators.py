"""How the weights of k consecutive layers become the weights of one: pure functions of tensors.

An operator sees the members' parameters by name (`self_attn.q_proj.weight` ...), their shares and the family's
record, and returns tensors of the same names and shapes; it never writes to what it is given. Legend: theta_k is a
parameter of member k, theta_0 of the base.

    Drop              theta_j, j = the member that is kept                       ShortGPT, arXiv:2403.03853
    Rdsc              theta_0 + sum_k (theta_k - theta_0)                        LaCo, arXiv:2402.11187, eq. 1
    ReplaceWithLast   theta_last                                                 LaCo's published notebooks
    WeightedAverage   sum_k share_k theta_k                                      MKA, arXiv:2406.16330

`Rdsc`, `ReplaceWithLast` and `WeightedAverage` act on the linear projections (with their biases); the norms of the
base are kept, as LaCo does.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lcprune.errors import InputError
from lcprune.merging import specs
from lcprune.merging.activity import Activity
from lcprune.merging.architectures import LayerLayout

LayerTensors = Mapping[str, Tensor]
"""A layer's parameters by their names inside the layer."""


class Operator(ABC):
    """k layers in, one layer out. Subclasses are frozen dataclasses with a `merge` method."""

    elementwise: ClassVar[bool] = False
    """Whether members are added entry by entry, which needs aligned weights to make sense."""

    needs_activity: ClassVar[bool] = False
    """Whether `merge` must be given what the members do on text."""

    def check(self, layout: LayerLayout) -> None:
        """Raises InputError for a family that this operator cannot merge; known before weights are loaded."""

    def source(self, shares: Sequence[float]) -> int:
        """Which member decides what kind of layer the merged one is (sliding or full attention, rotary or not).

        The one with the largest share, the earliest among equals; operators that keep one member name that one.
        """
        return max(range(len(shares)), key=lambda k: (shares[k], -k))

    @abstractmethod
    def merge(
        self,
        members: Sequence[LayerTensors],
        shares: Sequence[float],
        layout: LayerLayout,
        activity: Sequence[Activity] = (),
    ) -> dict[str, Tensor]:
        """The merged layer's tensors.

        Args:
            members: Parameters of the k members, the base first; equal names and shapes; left untouched.
            shares: One fraction per member, summing to 1.
            layout: The family's record.
            activity: One per member, where `needs_activity`; else empty.
        """


@dataclass(frozen=True)
class Drop(Operator):
    """Keeps one member whole and discards the others (ShortGPT, arXiv:2403.03853)."""

    keep: Literal["strongest", "first", "last"] = "strongest"
    """Which member stays: the one with the largest share (the earliest among equals), the first, or the last."""

    def __post_init__(self) -> None:
        if self.keep not in ("strongest", "first", "last"):
            raise InputError(f"keep={self.keep!r} of Drop must be strongest, first or last.")

    def source(self, shares: Sequence[float]) -> int:
        """The member that is kept."""
        return {"strongest": super().source(shares), "first": 0, "last": len(shares) - 1}[self.keep]

    def merge(
        self,
        members: Sequence[LayerTensors],
        shares: Sequence[float],
        layout: LayerLayout,
        activity: Sequence[Activity] = (),
    ) -> dict[str, Tensor]:
        """The kept member's tensors."""
        return {name: tensor.clone() for name, tensor in members[self.source(shares)].items()}


@dataclass(frozen=True)
class Rdsc(Operator):
    """Reserving the differences while seeking common: the base plus every difference to it (LaCo, eq. 1).

    The formula as printed. Weights of adjacent layers are nearly orthogonal, so the sum over k members has about
    sqrt((k-1) + (k-2)**2) times the norm of one: expect to need training or a refit behind it.
    """

    elementwise: ClassVar[bool] = True

    def merge(
        self,
        members: Sequence[LayerTensors],
        shares: Sequence[float],
        layout: LayerLayout,
        activity: Sequence[Activity] = (),
    ) -> dict[str, Tensor]:
        """theta_0 + sum over k of (theta_k - theta_0), accumulated in float32; norms of the base."""
        return _plus_differences(members, [1.0] * (len(members) - 1), layout)


@dataclass(frozen=True)
class ReplaceWithLast(Operator):
    """Linear projections of the last member, norms of the base: what LaCo's published code computes.

    It subtracts from a base that it has already overwritten, so that the sum telescopes; LaCo's published
    thresholds belong to this operator, not to `Rdsc`.
    """

    def source(self, shares: Sequence[float]) -> int:
        """The last member, whose projections are kept."""
        return len(shares) - 1

    def merge(
        self,
        members: Sequence[LayerTensors],
        shares: Sequence[float],
        layout: LayerLayout,
        activity: Sequence[Activity] = (),
    ) -> dict[str, Tensor]:
        """theta_last for projections, theta_0 for norms."""
        base, last = members[0], members[-1]
        return {name: (base if layout.is_norm(name) else last)[name].clone() for name in base}


@dataclass(frozen=True)
class WeightedAverage(Operator):
    """Average of the members' projections by their shares, norms of the base (after MKA, arXiv:2406.16330)."""

    elementwise: ClassVar[bool] = True

    def merge(
        self,
        members: Sequence[LayerTensors],
        shares: Sequence[float],
        layout: LayerLayout,
        activity: Sequence[Activity] = (),
    ) -> dict[str, Tensor]:
        """Sum over k of share_k theta_k, written as theta_0 + sum of share_k (theta_k - theta_0)."""
        return _plus_differences(members, shares[1:], layout)


def _plus_differences(
    members: Sequence[LayerTensors], factors: Sequence[float], layout: LayerLayout
) -> dict[str, Tensor]:
    """theta_0 + sum over k of factor_k (theta_k - theta_0), accumulated in float32 or better; norms of the base."""
    base = members[0]
    merged = {}
    for name, theta in base.items():
        total = theta.to(torch.promote_types(theta.dtype, torch.float32), copy=True)
        if not layout.is_norm(name):
            for factor, member in zip(factors, members[1:], strict=True):
                total += factor * (member[name].to(total.dtype) - theta.to(total.dtype))
        merged[name] = total.to(theta.dtype)
    return merged


def spec_of(operator: Operator) -> dict[str, object]:
    """The operator as plain data, for a plan; raises InputError as `specs.spec_of` does."""
    return specs.spec_of(Operator, operator)


def from_spec(spec: Mapping[str, object]) -> Operator:
    """The operator that `spec_of` described; raises InputError as `specs.from_spec` does."""
    return specs.from_spec(Operator, spec)
