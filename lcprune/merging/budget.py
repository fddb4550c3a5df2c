"""How short a model should become, in the user's own terms.

    Depth             24       so many layers; or 75%, so many of those that there are
    Parameters        100M     at most so many parameters, a tied head counted once
    Size              200MB    at most so many bytes on disk, in the dtype that the weights are stored in
    PerplexityRatio   1.3      at most 1.3 x the original's perplexity on the calibration text

The first three are a depth, known from the shapes alone: a model on the meta device will do. Layers may differ in
size, and which ones go is the planner's choice: the depth is such that the budget is kept even if the smallest go.
The last is measured plan by plan, see within.py.
"""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, inf, isfinite
from numbers import Real

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging.architectures import layout_of
from lcprune.merging.depths import layers_left
from lcprune.merging.planners import Planner

THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
BYTES = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
FILE_OVERHEAD = 256
"""Bytes per tensor that a safetensors file and its index may need for the tensor's name, type, shape and place."""


class Budget(ABC):
    """How much of a model may remain. Subclasses are frozen dataclasses with a `depth` method."""

    @abstractmethod
    def depth(self, model: PreTrainedModel) -> int | None:
        """How many layers keep to the budget, from shapes alone; None where only measuring tells.

        Args:
            model: The unmerged model; on the meta device if need be, see `on_meta`.

        Raises:
            InputError: If no depth keeps to the budget, or the model does already.
        """

    def check_reached(self, planner: Planner, reached: int, wanted: int) -> None:
        """Raises InputError if a plan ends before the budget is kept."""


@dataclass(frozen=True)
class Depth(Budget):
    """So many layers; a planner with a threshold of its own may stop before."""

    target_depth: int | str
    """Number of layers that remain, or the share of the layers that does, such as "75%"."""

    def depth(self, model: PreTrainedModel) -> int:
        """The number, if the model has more layers."""
        return check_target_depth(self.target_depth, len(layout_of(model.config).layers_of(model)))


class _Amount(Budget):
    """At most so much, by counting the tensors of the model."""

    def _within(self, name: str, given: object, limit: int, weights: "_Weights", units: Mapping[str, int]) -> int:
        total = weights.outside + sum(weights.layers)
        if limit >= total:
            raise InputError(
                f"{name}={given} is no less than the model has, {amount(total, units)}: nothing would have to go, "
                "ask for less."
            )
        left, depth = total, len(weights.layers)
        for layer in sorted(weights.layers)[:-1]:
            if left <= limit:
                break
            left, depth = left - layer, depth - 1
        if left > limit:
            raise InputError(
                f"{name}={given} is less than the embeddings, the head and the one layer that has to stay: ask for "
                f"{amount(left, units, up=True)} or more, or choose a smaller model."
            )
        return depth

    def check_reached(self, planner: Planner, reached: int, wanted: int) -> None:
        """Raises InputError if the planner has stopped too early."""
        if reached > wanted:
            raise InputError(
                f"{self} takes {wanted} layers, and {planner} stops at {reached}: change its settings, choose a "
                "planner that goes on to any depth (OneShotRanking, GreedyPlanner), or allow more."
            )


@dataclass(frozen=True)
class Parameters(_Amount):
    """At most so many parameters; a tied head counts once."""

    target_params: int | float | str
    """A number, with K, M, B or T behind it if you like, such as 100M."""

    def __post_init__(self) -> None:
        _parsed("target_params", self.target_params, THOUSANDS, "100M")

    def depth(self, model: PreTrainedModel) -> int:
        """The most layers within the budget, whichever go."""
        limit = _parsed("target_params", self.target_params, THOUSANDS, "100M")
        weights = _Weights.of(model, lambda name, tensor: tensor.numel())
        return self._within("target_params", self.target_params, limit, weights, THOUSANDS)


@dataclass(frozen=True)
class Size(_Amount):
    """At most so many bytes of weights on disk, in the dtype that the model given has."""

    target_size: int | float | str
    """A number of bytes, with KB, MB, GB (powers of 1000), KiB, MiB or GiB (of 1024) behind it, such as 200MB."""

    def __post_init__(self) -> None:
        _parsed("target_size", self.target_size, BYTES, "200MB")

    def depth(self, model: PreTrainedModel) -> int:
        """The most layers within the budget, whichever go."""
        limit = _parsed("target_size", self.target_size, BYTES, "200MB")
        weights = _Weights.of(model, lambda name, tensor: tensor.nbytes + len(name) + FILE_OVERHEAD)
        return self._within("target_size", self.target_size, limit, weights, BYTES)


@dataclass(frozen=True)
class PerplexityRatio(Budget):
    """As short as the perplexity on the calibration text stays below a multiple of the original's."""

    max_perplexity_ratio: float
    """The multiple, above 1; 1.3 allows 30 % more."""

    def __post_init__(self) -> None:
        number = isinstance(self.max_perplexity_ratio, Real)
        if not (number and self.max_perplexity_ratio > 1 and isfinite(self.max_perplexity_ratio)):
            raise InputError(
                f"max_perplexity_ratio={self.max_perplexity_ratio} must be a number above 1, the multiple of the "
                "original's perplexity that is allowed, such as 1.3."
            )

    def depth(self, model: PreTrainedModel) -> None:
        """Not known from shapes."""


def one_of(
    *,
    target_depth: int | str | None = None,
    target_params: int | float | str | None = None,
    target_size: int | float | str | None = None,
    max_perplexity_ratio: float | None = None,
) -> Budget | None:
    """The budget of whichever is given; None if none is; raises InputError if several are."""
    given = {name: value for name, value in locals().items() if value is not None}
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are ways to say the same thing, how short: give one of them.")
    kinds: dict[str, Callable[..., Budget]] = {
        "target_depth": Depth,
        "target_params": Parameters,
        "target_size": Size,
        "max_perplexity_ratio": PerplexityRatio,
    }
    return next((kinds[name](value) for name, value in given.items()), None)


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a config describes, in the dtype it is stored in, with shapes and no weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    return model


def check_target_depth(target: int | str, depth: int) -> int:
    """The layers of a target that is at least 1 and below the model's depth; raises InputError for another."""
    layers = layers_left(target, depth)
    if not 1 <= layers < depth:
        raise InputError(
            f"target_depth={target} must lie between 1 and {depth - 1}, because the model has {depth} layers."
        )
    return layers


def feasible_depths(planner: Planner, depth: int) -> list[int]:
    """The depths that a planner does not refuse beforehand, deepest first; raises InputError if there is none."""
    if depth < 2:
        raise InputError(f"The model has {depth} layer: to merge takes 2 or more.")
    found, refusal = [], None
    for target in range(depth - 1, 0, -1):
        try:
            planner.check(depth, target)
        except InputError as error:
            refusal = refusal or error
        else:
            found.append(target)
    if not found and refusal is not None:
        raise refusal
    return found


@dataclass(frozen=True)
class _Weights:
    """How much the parts of a model weigh."""

    outside: int
    """Embeddings, final norm, head and whatever else is no layer; shared tensors once."""
    layers: tuple[int, ...]
    """Every layer."""

    @classmethod
    def of(cls, model: PreTrainedModel, weight: Callable[[str, Tensor], int]) -> "_Weights":
        """Weighs parameters and what else is stored with them."""
        stored = model.state_dict().keys()
        tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in stored)]
        layers = layout_of(model.config).layers_of(model)
        inside = [{id(tensor) for tensor in (*layer.parameters(), *layer.buffers())} for layer in layers]
        of_layers = [sum(weight(name, tensor) for name, tensor in tensors if id(tensor) in each) for each in inside]
        return cls(sum(weight(name, tensor) for name, tensor in tensors) - sum(of_layers), tuple(of_layers))


def _parsed(name: str, given: int | float | str, units: Mapping[str, int], example: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:_\d+)*\.?\d*(?:[eE]\+?\d+)?)\s*([A-Za-z]*)\s*", str(given))
    by_name = {unit.upper(): factor for unit, factor in {"": 1, **units}.items()}
    factor = by_name.get(match[2].upper()) if match else None
    if match is None or factor is None or isinstance(given, bool) or not 1 <= float(match[1]) * factor < inf:
        allowed = ", ".join(unit for unit in units if unit)
        raise InputError(f"{name}={given} must be a number above 0, alone or with {allowed} behind it, like {example}.")
    return int(float(match[1]) * factor)


def amount(number: int, units: Mapping[str, int], *, up: bool = False) -> str:
    """The number with one decimal and a unit of `THOUSANDS` or `BYTES`; rounded up where less would not do."""
    unit, factor = max(
        ((unit, factor) for unit, factor in units.items() if factor <= number and not unit.endswith("iB")),
        key=lambda one: one[1],
    )
    tenths = number * 10 / factor
    return f"{(ceil(tenths) if up else round(tenths)) / 10:,.1f}{unit}" if factor > 1 else f"{number}{unit}"
