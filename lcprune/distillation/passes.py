"""One batch through a model: no further than asked, and not twice through what student and teacher share.

    teacher   embeddings -> 0 .. p-1 | p .. stop        outputs and calls of chosen layers are kept on the way
    student               handed over| p .. stop        the prefix is the teacher's own, frozen: it is not run again
    local                 one merged layer alone, called as the teacher called the first of its ancestors

The student's backward pass ends where it was handed over, since what comes from the teacher has no gradient. Layers
are stood in for at the level of the call, above their hooks, which do not run, and their (perhaps compiled) forward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.distillation.trained import is_adapter
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, hidden_states, layer_outputs, stream_of
from lcprune.merging.lineage import Lineage


@dataclass(frozen=True)
class Call:
    """How a model called one of its layers."""

    state_BTD: Tensor
    """The residual stream that went in."""
    positional: tuple[Any, ...]
    """What followed it by position."""
    arguments: Mapping[str, Any]
    """What came by name: masks, positions, rotary embeddings."""
    in_tuple: bool
    """Whether the layers of this model return the state inside a tuple."""

    def run(self, layer: nn.Module, state_BTD: Tensor) -> Tensor:
        """What another layer makes of a state, called the same way otherwise."""
        return stream_of(layer(state_BTD, *self.positional, **self.arguments))


@dataclass(frozen=True)
class Wanted:
    """What a pass is asked for; layers by their number in the model that runs."""

    last: bool = True
    """The state behind the final norm. Without it the pass ends behind the last layer that is wanted."""
    outputs: Sequence[int] = ()
    """Layers whose outputs are kept."""
    calls: Sequence[int] = ()
    """Layers whose inputs and arguments are kept."""

    @property
    def nothing(self) -> bool:
        """Whether there is no reason to run at all."""
        return not (self.last or self.outputs or self.calls)


@dataclass(frozen=True)
class States:
    """What a pass has kept."""

    last: Tensor | None
    """State [B, T, D] after the final norm."""
    layers: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> its output [B, T, D]."""
    calls: dict[int, Call] = field(default_factory=dict)
    """Layer -> how it was called."""


@dataclass(frozen=True)
class Start:
    """Where a student's pass begins."""

    layer: int
    """The first layer that runs."""
    call: Call
    """How the teacher called its own layer of that number."""
    outputs: Mapping[int, Tensor]
    """The teacher's outputs of layers before it, for those who ask the student for them."""


class _Enough(Exception):
    """Everything wanted has been seen."""


def forward(model: PreTrainedModel, batch: Batch, wanted: Wanted, start: Start | None = None) -> States:
    """Runs a causal LM of a known family over a batch, without its head.

    Args:
        model: Teacher or student.
        batch: `input_ids` [B, T], perhaps `attention_mask`.
        wanted: What to keep, and so how far to go.
        start: Where to begin, instead of at the embeddings.
    """
    layers = layout_of(model.config).layers_of(model)
    first = 0 if start is None else start.layer
    handed = {} if start is None else {s: start.outputs[s] for s in wanted.outputs if s < first}
    outputs = [index for index in wanted.outputs if index >= first]
    calls: dict[int, Call] = {}
    with ExitStack() as stack:
        states = stack.enter_context(layer_outputs(layers, outputs))
        stack.enter_context(_calls(layers, wanted.calls, calls))
        if start is not None:
            stack.enter_context(_handed_over(layers, start))
        if wanted.last:
            return States(hidden_states(model, batch), {**handed, **states}, calls)
        if outputs or wanted.calls:
            stack.enter_context(_ending(layers[max(*outputs, *wanted.calls, -1)]))
            with suppress(_Enough):
                hidden_states(model, batch)
    return States(None, {**handed, **states}, calls)


def calls_without_running(model: PreTrainedModel, batch: Batch, wanted: Sequence[int]) -> dict[int, Call]:
    """How a causal LM would call its layers, without the work: the embeddings run, no layer does.

    Of the states that go in, only layer 0's is right.
    """
    calls: dict[int, Call] = {}
    layers = layout_of(model.config).layers_of(model)
    in_tuple: list[bool] = []

    def recorder(index: int):  # type: ignore[no-untyped-def]
        def record(*args: Any, **kwargs: Any) -> object:
            if not in_tuple:
                # Some families' layers return a tuple, others the state: the first one is run to find out.
                in_tuple.append(isinstance(type(layers[0]).forward(layers[0], *args, **kwargs), tuple))
            named = dict(kwargs)
            state: Tensor = args[0] if args else named.pop("hidden_states")
            if index in wanted:
                calls[index] = Call(state, args[1:], named, in_tuple[0])
            if index == max(wanted):
                raise _Enough
            return (state,) if in_tuple[0] else state

        return record

    if wanted:
        with _standing_in(layers, recorder), suppress(_Enough):
            hidden_states(model, batch)
    return calls


@contextmanager
def _calls(layers: nn.ModuleList, wanted: Sequence[int], calls: dict[int, Call]) -> Iterator[None]:
    def keeper(index: int):  # type: ignore[no-untyped-def]
        def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: object) -> None:
            named = dict(kwargs)
            state = args[0] if args else named.pop("hidden_states")
            calls[index] = Call(state, args[1:], named, isinstance(output, tuple))

        return keep

    handles = [layers[index].register_forward_hook(keeper(index), with_kwargs=True) for index in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _ending(layer: nn.Module) -> Iterator[None]:
    """The pass ends behind this layer; hooks that were there before have seen it."""

    def end(*_: object) -> None:
        raise _Enough

    handle = layer.register_forward_hook(end)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _handed_over(layers: nn.ModuleList, start: Start) -> Iterator[None]:
    """Layers before the start hand on what the teacher's have made, in the precision of the first that runs."""
    state = start.call.state_BTD.to(stream_dtype(layers[start.layer]))
    result = (state,) if start.call.in_tuple else state
    with _standing_in(layers[: start.layer], lambda index: lambda *args, **kwargs: result):
        yield


@contextmanager
def _standing_in(layers: nn.ModuleList, actor: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """What each of these layers does when it is called, inside the block; by its place among them."""
    before = [(layer, layer._compiled_call_impl) for layer in layers]
    try:
        for index, (layer, _) in enumerate(before):
            layer._compiled_call_impl = actor(index)
        yield
    finally:
        for layer, compiled in before:
            layer._compiled_call_impl = compiled


def frozen_prefix(student: PreTrainedModel, lineage: Lineage) -> int:
    """How many of the student's first layers descend from one teacher layer each and are not trained.

    0 unless the embeddings are frozen too. At least one layer is left, for the student to run.
    """
    layers = layout_of(student.config).layers_of(student)
    if _trained(student.get_input_embeddings()):
        return 0
    merged = (place for place, ancestors in enumerate(lineage) if len(ancestors) > 1)
    trained = (place for place, layer in enumerate(layers) if _trained(layer))
    return min(*merged, *trained, len(layers) - 1, len(layers) - 1)


def stream_dtype(layer: nn.Module) -> torch.dtype:
    """What a layer takes its states in: the type of its own weights, neither packed ones nor adapters."""
    named = layer.named_parameters()
    return next(weight.dtype for name, weight in named if weight.is_floating_point() and not is_adapter(name))


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
