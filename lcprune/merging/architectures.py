"""Which record belongs to a model: by its `model_type`, else by the names of its modules.

    config --model_type--> a record of `LAYOUTS`
      |   `--not listed---> a model without weights is built; if its layers hold exactly the modules of a Llama layer,
      |                     a record is drawn up and the log says so, once
      v
    anything else: one InputError that shows the record to add

Layers of different kinds (sliding and full attention, with rotary positions and without) have weights of the same
names and shapes, but other masks and positions. The rule: **a merged layer is of the kind of the member that
`Operator.source` names**: the one whose weights are kept, and for mixtures the one with the largest share (the
earliest among equals). Config entries and module settings come from that member; the Parameters stay the base's.
"""

import copy
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel

from lcprune.errors import InputError, reason
from lcprune.merging import families
from lcprune.merging.families import Branch, LayerLayout, Producer

__all__ = ["Branch", "LayerLayout", "Producer", "layout_of"]

_LOG = logging.getLogger(__name__)
_LLAMA = LayerLayout("llama")


def layout_of(config: PretrainedConfig) -> LayerLayout:
    """The record of a config's family, or one drawn up for a family that is shaped like Llama.

    Raises:
        InputError: For a family that is neither, or for settings of a known one that no record holds for.
    """
    records = [layout for layout in families.LAYOUTS if layout.model_type == config.model_type]
    for layout in records:
        if not _unmet(layout, config):
            return layout
    if records:
        raise InputError(_unfit(config, records[-1]))
    # Flags decide which modules a layer has; depth and per-layer lists change with every merge.
    key = (config.model_type, *sorted(name for name, value in vars(config).items() if value is True))
    if key not in _RECOGNISED:
        _RECOGNISED[key] = _recognise(config)
    return _RECOGNISED[key]


_RECOGNISED: dict[tuple[str, ...], LayerLayout] = {}


def check_config(config: PretrainedConfig, named: str) -> None:
    """Refuses a config that describes no model of plain numbers; the model is built without weights to see.

    Args:
        config: Of the model.
        named: The setting that names the model, and its value.

    Raises:
        InputError: Its weights are packed, no floating-point numbers or in a file elsewhere, or nothing can be built.
    """
    dtype, file = config.dtype, getattr(config, "transformers_weights", None)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{named} is quantised, and packed numbers cannot be merged: name it as it was before that.")
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise InputError(f"{named} says dtype={dtype} in its config.json, which is no floating-point type: correct it.")
    if file is not None and (Path(file).name != file or not file.endswith(".safetensors")):
        raise InputError(f"{named} says transformers_weights={file!r}, no safetensors file in its folder: correct it.")
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except _CANNOT_BE_BUILT as error:
        raise InputError(
            f"{named}: transformers cannot build the model that its config.json describes ({type(error).__name__}: "
            f"{reason(error)[:200]}): correct the config, or fetch the model anew."
        ) from error


def check_weights(model: nn.Module) -> None:
    """Refuses a model in memory whose weights are not all there is to its layers, or are no plain numbers.

    Raises:
        InputError: Its projections are wrapped by adapters, or its weights are packed.
    """
    named = dict(model.named_parameters())
    if adapted := next((name for name in named if ".lora_" in name or ".base_layer." in name), None):
        raise InputError(
            f"The {type(model).__name__} has adapters ({adapted}), and those of several layers cannot become one: put "
            "them into the weights with merge_and_unload() first, and give the model that it returns."
        )
    # Of one byte a number: float8, which counts in units that are kept elsewhere.
    packed = next((name for name, each in named.items() if not each.is_floating_point() or each.itemsize == 1), None)
    if packed:
        raise InputError(
            f"The {type(model).__name__} is quantised ({packed} is {named[packed].dtype}), and packed numbers cannot "
            "be merged: load it unquantised."
        )


def _unmet(layout: LayerLayout, config: PretrainedConfig) -> list[str]:
    return [name for name, allowed in layout.only.items() if getattr(config, name, None) not in allowed]


def _unfit(config: PretrainedConfig, layout: LayerLayout) -> str:
    unmet = _unmet(layout, config)
    given = ", ".join(f"{name}={getattr(config, name, None)!r}" for name in unmet)
    allowed = ", ".join(f"{name}={' or '.join(map(repr, layout.only[name]))}" for name in unmet)
    return (
        f"model_type={config.model_type!r} with {given} cannot be merged, lcprune knows this family only with "
        f"{allowed}: choose another of its models."
    )


# What the constructors of transformers' models raise for configs of encoders, of other tasks and of missing packages.
_CANNOT_BE_BUILT = (
    ValueError,
    ImportError,
    RuntimeError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
)


def _recognise(config: PretrainedConfig) -> LayerLayout:
    """A record for a family that has none, read off a model without weights."""
    try:
        model = _built(config)
    except _CANNOT_BE_BUILT as error:
        raise InputError(_unknown(config, "transformers builds no causal LM from its config")) from error
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    # The first of the right length is the outermost: heads may have lists of their own inside the layers.
    depth = getattr(config, _LLAMA.depth_field, None)
    path, layers = max(lists, key=lambda named: (len(named[1]) == depth, len(named[1])), default=("", nn.ModuleList()))
    if difference := _difference_from_llama(model, config, path, layers):
        raise InputError(_unknown(config, difference, path))
    _LOG.warning(
        f"model_type={config.model_type!r} has no record in lcprune; its layers hold the modules of a Llama layer, so "
        "they are merged like those."
    )
    names = dict(layers[0].named_modules())
    return LayerLayout(
        config.model_type,
        norms=tuple(name for name, module in names.items() if _is_norm(module)),
        indexed=tuple(name for name, module in names.items() if "layer_idx" in vars(module)),
        per_layer_fields=tuple(
            name
            for name, value in vars(config).items()
            if isinstance(value, list) and len(value) == len(layers) and not name.endswith("token_id")
        ),
        norm_offset=_norm_offset(layers[0].get_submodule("input_layernorm")),
    )


def _built(config: PretrainedConfig) -> PreTrainedModel:
    """The causal LM of a config without weights, of transformers' or of a class that the program has defined."""
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
        except ValueError:  # it is not registered
            own = [kind for kind in _below(PreTrainedModel) if kind.config_class is type(config)]
            own = [kind for kind in own if issubclass(kind, GenerationMixin)]
            if not own or own[0].__module__.startswith("transformers."):
                raise
            model = own[0](copy.deepcopy(config))
    assert isinstance(model, PreTrainedModel)
    return model


def _below(kind: type[PreTrainedModel]) -> Iterator[type[PreTrainedModel]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _below(sub)


def _difference_from_llama(model: PreTrainedModel, config: PretrainedConfig, path: str, layers: nn.ModuleList) -> str:
    """What keeps a model from being merged like a Llama, in a few words; empty if nothing does."""
    if path != _LLAMA.layers:
        return f"its layers are at {path or 'no single place'}, not at {_LLAMA.layers}"
    if getattr(config, _LLAMA.depth_field, None) != len(layers):
        return f"its config has no {_LLAMA.depth_field} of {len(layers)}"
    if not _is_norm(dict(model.named_modules()).get(_LLAMA.final_norm, nn.Identity())):
        return f"it has no {_LLAMA.final_norm}"
    assert _LLAMA.mlp is not None
    branches = (_LLAMA.attention, _LLAMA.mlp)
    expected = {*_LLAMA.norms, *(module for b in branches for module in (b.consumer, *(p.name for p in b.producers)))}
    for layer in layers:
        found = {
            name
            for name, module in layer.named_modules()
            if _is_norm(module) or next(module.parameters(recurse=False), None) is not None
        }
        inner = {name for name in found if name.startswith("self_attn.") and _is_norm(layer.get_submodule(name))}
        if missing := expected - found:
            return f"its layers have no {_listed(missing)}"
        if surplus := found - expected - inner:
            return f"its layers have weights of their own in {_listed(surplus)}"
        if _shapes(layer) != _shapes(layers[0]):
            return "its layers differ in shape"
    return ""


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in layer.named_parameters()}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(name or "the layer itself" for name in names))


def _norm_offset(norm: nn.Module) -> float:
    """1 if the module multiplies by its weight plus one, found by running it with a weight of zero."""
    if not list(norm.parameters()):
        return 0.0
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        return float(probe(torch.tensor([1.0, -1.0]).repeat(parameter.numel() // 2)).any())


def _unknown(config: PretrainedConfig, difference: str, path: str = "...") -> str:
    known = ", ".join(dict.fromkeys(layout.model_type for layout in families.LAYOUTS))
    return (
        f"model_type={config.model_type!r} is a family lcprune does not know and that is not shaped like Llama "
        f"({difference}); it knows {known}: choose a model of one of these, or add one record to "
        f"lcprune.merging.families.LAYOUTS, LayerLayout({config.model_type!r}, layers={path!r}, ...) with the names "
        "that differ from Llama's."
    )
