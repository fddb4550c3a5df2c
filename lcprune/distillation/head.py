"""The output head of any causal LM as plain tensors.

    u = scale * (h W^T + s (h A^T) B^T + b)      A, B of rank r are an adapter on the head (LoRA)
    z = cap * tanh(u / cap)                      its logits, soft-capped where the family does so

Legend: `N` tokens, `D` hidden, `V` vocabulary, `R` rank.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True, eq=False)
class LowRank:
    """An adapter on a head: adds scaling * B A to its weight."""

    down_RD: Tensor
    """A of the adapter, from hidden size D to rank R."""
    up_VR: Tensor
    """B of the adapter, from rank R to the vocabulary V."""
    scaling: float = 1.0
    """s, alpha / r in peft."""


@dataclass(frozen=True, eq=False)
class Head:
    """What turns last states into logits.

    Example:
        >>> Head(torch.randn(V, D), cap=30.0)(states_ND).shape
        torch.Size([N, V])
    """

    weight_VD: Tensor
    """The head's weight W; logits are states W^T."""
    bias_V: Tensor | None = None
    """b, for those that have one (phi)."""
    scale: float = 1.0
    """Factor of the logits (cohere's logit_scale, the inverse of granite's logits_scaling)."""
    cap: float | None = None
    """Bound of the logits (gemma2's final_logit_softcapping); None = unbounded."""
    low_rank: LowRank | None = None
    """The adapter that is on it."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """W, b, A and B."""
        adapter = (None, None) if self.low_rank is None else (self.low_rank.down_RD, self.low_rank.up_VR)
        return (self.weight_VD, self.bias_V, *adapter)

    @property
    def is_product(self) -> bool:
        """Whether its logits are h W^T and nothing else."""
        return self.bias_V is None and self.low_rank is None and self.scale == 1 and self.cap is None

    def holding(self, tensors: tuple[Tensor | None, ...]) -> "Head":
        """The same head around other W, b, A and B."""
        weight, bias, down, up = tensors
        assert weight is not None
        adapter = self.low_rank
        if adapter is not None:
            assert down is not None
            assert up is not None
            adapter = LowRank(down, up, adapter.scaling)
        return replace(self, weight_VD=weight, bias_V=bias, low_rank=adapter)

    def to(self, dtype: torch.dtype) -> "Head":
        """The same head in another dtype."""
        return self.holding(tuple(None if tensor is None else tensor.to(dtype) for tensor in self.tensors))

    def detach(self) -> "Head":
        """The same head, constant to autograd."""
        return self.holding(tuple(None if tensor is None else tensor.detach() for tensor in self.tensors))

    def __call__(self, states_ND: Tensor) -> Tensor:
        """The logits [..., V], at once and in plain operations; multiplied in the dtype of the states."""
        head = self.to(states_ND.dtype)
        values = linear(states_ND, head.weight_VD, head.bias_V)
        if head.low_rank is not None:
            values = values + (states_ND @ head.low_rank.down_RD.t()) @ head.low_rank.up_VR.t() * head.low_rank.scaling
        if head.scale != 1:
            values = values * head.scale
        return values if head.cap is None else torch.tanh(values / head.cap) * head.cap
