"""What a decoder layer saves for its backward pass and how much it computes, found without weights.

The model is built one and two layers deep out of tensors that have shapes and no memory (torch's FakeTensorMode) and
is run as in training: what autograd saves, less the Parameters, is the memory of activations, whichever family it is;
the difference between the two depths is that of one layer. Not in it: masks of layers whose window is shorter than a
block. Legend: `B` rows, `T` tokens, `D` hidden.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from lcprune.distillation.adapters import Lora
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import hidden_states

PLAIN = "lcprune_traced"
"""The attention that is traced: with shapes alone transformers would make masks that a training step does without."""


def _plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    grouped = key.shape[1] != query.shape[1]
    output = scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(PLAIN, _plain_attention)


@dataclass(frozen=True)
class Shape:
    """One batch, and what it is computed in."""

    rows: int
    """Blocks in a batch, B."""
    length: int
    """Tokens in a block, T."""
    weights: torch.dtype
    """Type of the weights."""
    autocast: torch.dtype | None = None
    """What products are computed in, where that is another type."""


@dataclass(frozen=True)
class LayerCost:
    """Of a batch."""

    saved: int
    """Bytes that one layer keeps for its backward pass, cast copies of its weights included."""
    outside: int
    """Bytes that embeddings and final norm keep."""
    state: int
    """Bytes of the residual stream [B, T, D]."""
    flops: int
    """Floating-point operations of one layer's forward pass; a multiplication and an addition are two."""


def cost_of_layer(config: PretrainedConfig, shape: Shape, lora: Lora | None = None) -> LayerCost:
    """Traces a model of one layer and one of two.

    Args:
        config: Of a causal LM of a known family.
        shape: The batch.
        lora: Adapters that are trained instead of the weights.
    """
    one, two = (_trace(config, depth, shape, lora) for depth in (1, 2))
    saved, flops = two[0] - one[0], two[2] - one[2]
    return LayerCost(saved, max(0, one[0] - saved), one[1], flops)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


# Torch counts the kernels of GPUs, and here the CPU's stands for them.
_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _trace(config: PretrainedConfig, depth: int, shape: Shape, lora: Lora | None) -> tuple[int, int, int]:
    """Bytes saved, bytes of the last state, and operations of a forward pass without the head."""
    layout, config = layout_of(config), copy.deepcopy(config)
    layout.keep_layers(config, list(range(depth)))
    # Without memory experts' grouped products are known in bfloat16 alone; wider types are taken to need as much more.
    experts = layout.mlp is None
    weights, low = (torch.bfloat16, None) if experts else (shape.weights, shape.autocast)
    wider = shape.weights.itemsize // weights.itemsize
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        model = AutoModelForCausalLM.from_config(config, dtype=weights, trust_remote_code=False).train()
        if lora is not None:
            model.requires_grad_(False)
            for layer in layout.layers_of(model):
                for name in lora.projections(layout):
                    layer.set_submodule(name, _Adapted(layer.get_submodule(name), lora.rank))
        if model.config._attn_implementation == "sdpa" and type(model)._supports_attention_backend:
            model.set_attn_implementation(PLAIN)
        saved = _Saved(list(model.parameters()))
        with (
            torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=low, enabled=low is not None),
        ):
            batch = {"input_ids": torch.zeros(shape.rows, shape.length, dtype=torch.int64)}
            state = hidden_states(model, batch)
    return saved.bytes * wider, state.nbytes * wider, counter.get_total_flops()


class _Adapted(nn.Module):
    """A projection with an adapter, as peft computes it; peft itself cannot wrap what has no memory."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        weight = base.get_parameter("weight")
        outputs, inputs = weight.shape if isinstance(base, nn.Linear) else weight.shape[::-1]
        self.base, self.down = base, nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, state: Tensor) -> Tensor:
        return self.base(state) + self.up(self.down(state.to(self.down.weight.dtype))) * 2.0


class _Saved:
    """Counts every storage that autograd keeps once, Parameters not at all."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._known = {_key(parameter) for parameter in parameters}
        self._alive: list[Tensor] = []  # or another tensor might come to lie where one was
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        if _key(tensor) not in self._known:
            self._known.add(_key(tensor))
            self._alive.append(tensor)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
