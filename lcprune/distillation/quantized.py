"""Weights in 8 or 4 bit by bitsandbytes: teachers to look up to, and the frozen base below a student's adapters.

    int8    LLM.int8(), arXiv:2208.07339; teachers only
    nf4     4-bit NormalFloat in blocks of 64 with a float32 scale each, arXiv:2305.14314

Embeddings, norms and the output layer keep their floating-point type. Packed bytes are never added or averaged:
`unpacked` and `repack` are the way there and back. A weight that was packed once is packed the same way again, bit for
bit, so that going there and back without a change costs nothing.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lcprune.errors import InputError

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit  # importing bitsandbytes takes a second

Packed: TypeAlias = Literal["int8", "nf4"]
"""How weights can be packed."""
BLOCK = 64
"""Weights that share a scale."""


def config_for(packed: Packed, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` is told; products are computed in `dtype`."""
    quieten()
    if packed == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def quieten() -> None:
    """Silences bitsandbytes, which says on import what else to install and at every int8 product that it casts."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def settle(model: PreTrainedModel) -> None:
    """To be called once on a model that was loaded packed.

    Raises:
        InputError: If it is on a CPU and its rows are not whole blocks, which bitsandbytes computes wrongly there.
    """
    for name, linear in _linears(model).items():
        if linear.weight.device.type == "cpu" and linear.in_features % BLOCK:
            raise InputError(
                f"nf4: {name} has {linear.in_features} inputs, no multiple of {BLOCK}, which bitsandbytes computes "
                "wrongly on CPUs: use int8 or no quantisation there, or a GPU."
            )
        # Its layout for some CPUs rounds to bfloat16, in evaluation only: a student would not be the one trained.
        vars(linear)["support_avx512bf16_for_cpu"] = False


def second_view(model: PreTrainedModel) -> PreTrainedModel:
    """As `surgery.second_view`, of a packed model: packed bytes and scales are shared too."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        if parameter.dtype == torch.uint8:
            memo[id(parameter)] = copy.copy(parameter)
            state = vars(parameter)["quant_state"]
            memo[id(state)] = state
        else:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    view = copy.deepcopy(model, memo)
    assert isinstance(view, PreTrainedModel)
    return view


def is_packed(module: nn.Module) -> bool:
    """Whether a projection holds its weights in 4 bit."""
    weight = module.weight
    return isinstance(weight, Tensor) and weight.dtype == torch.uint8


def holds_packed(model: nn.Module) -> bool:
    """Whether weights of a model are held in 4 or 8 bit."""
    return any(parameter.dtype in (torch.uint8, torch.int8) for parameter in model.parameters())


def packed_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights in 4 bit, by their names."""
    return {name: weight for name, weight in model.named_parameters() if weight.dtype == torch.uint8}


def packed_names(model: nn.Module) -> list[str]:
    """The projections that these are the weights of."""
    return [name.rpartition(".")[0] for name in packed_weights(model)]


def unpacked(linear: nn.Linear) -> nn.Linear:
    """The plain projection that a packed one stands for; its bias is the same Parameter."""
    from bitsandbytes.functional import dequantize_4bit

    weight_OI = dequantize_4bit(linear.weight.data, vars(linear.weight)["quant_state"])
    projection = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    projection.weight = nn.Parameter(weight_OI, requires_grad=False)
    projection.bias = linear.bias
    return projection.train(linear.training)


def repack(linear: nn.Linear, weight_OI: Tensor) -> None:
    """Gives a packed projection other weights, in storage of their own."""
    from bitsandbytes.nn import Params4bit

    device = linear.weight.device
    fresh = Params4bit(
        weight_OI, quant_type="nf4", compress_statistics=False, blocksize=BLOCK, module=cast("Linear4bit", linear)
    )
    linear.weight = fresh.to(device)  # type: ignore[misc]
    vars(linear)["is_own"] = True


def own_weights(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Packed weights that are no longer those of the folder they came from, by module: bytes, scales and settings."""
    return {
        name: {
            "weight": linear.weight.detach().as_subclass(Tensor),
            **vars(linear.weight)["quant_state"].as_dict(packed=True),
        }
        for name, linear in _linears(model).items()
        if vars(linear).get("is_own", False)
    }


def restore(model: nn.Module, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Puts back what `own_weights` returned."""
    if not weights:
        return
    from bitsandbytes.nn import Params4bit

    linears = _linears(model)
    for name, stored in weights.items():
        stats = {key: tensor for key, tensor in stored.items() if key != "weight"}
        linear = linears[name]
        linear.weight = Params4bit.from_prequantized(
            stored["weight"], stats, device=linear.weight.device, module=cast("Linear4bit", linear)
        )
        vars(linear)["is_own"] = True


def keys_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Which of a state dict's names belong to packed weights."""
    starts = tuple(f"{name}.weight" for name in packed_names(model))
    return [name for name in names if name.startswith(starts)]


def forget(model: PreTrainedModel) -> None:
    """Takes away transformers' notes that a model is packed, once it is not."""
    for name in ("hf_quantizer", "is_loaded_in_4bit", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: cast(nn.Linear, model.get_submodule(name)) for name in packed_names(model)}
