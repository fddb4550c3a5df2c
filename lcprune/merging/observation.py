"""One layer watched while a batch runs through it: what its output projections are fed and where they write to.

    x --norm--> attention --o--> + --norm--> MLP --down--> +          middle = the stream between the two
     `-------------------------' `------------------------'

Legend: `B` batch, `T` tokens, `D` hidden, `I` inputs of a projection.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lcprune.merging.architectures import Branch, LayerLayout, layout_of
from lcprune.merging.streams import Stream


@dataclass(frozen=True)
class Written:
    """What one branch fed its output projection, and what went into a norm behind it."""

    inputs_BTI: Tensor
    """Inputs of the projection."""
    before_norm_BTD: Tensor | None
    """The projection's output, in families with a norm between it and the stream."""


@dataclass(frozen=True)
class Seen:
    """One batch in one layer."""

    output_BTD: Tensor
    """The stream behind the layer."""
    middle_BTD: Tensor | None
    """The stream between attention and MLP; None where both read the same one or the MLP consists of experts."""
    attention: Written
    mlp: Written | None
    """None where the MLP consists of experts."""


def observe(stream: Stream, layer: nn.Module, index: int) -> Seen:
    """Runs batch `index` through a layer, without moving it, and returns what passed by."""
    layout, entry = layout_of(stream.model.config), stream.states[index]
    with _inputs(layer, _watched(layout)) as inputs:
        output = stream.run(layer, index)
    mlp = _written(layout.mlp, inputs, entry) if layout.mlp is not None else None
    return Seen(output, _middle(layout, inputs, entry), _written(layout.attention, inputs, entry), mlp)


def observe_attention(stream: Stream, layer: nn.Module, index: int) -> tuple[Written, Tensor]:
    """What the attention alone feeds its projection, and the stream [B, T, D] that this writes to.

    The layer runs no further than to the entrance of its MLP, unless attention and MLP read the same stream or
    experts follow: then what is written to is the stream behind the layer.
    """
    layout, entry = layout_of(stream.model.config), stream.states[index]
    with _inputs(layer, _watched(layout)) as inputs:
        handles = []
        if layout.mlp is not None:

            def leave(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
                if _middle(layout, inputs, entry) is not None:
                    raise _Enough

            entrance = layer.get_submodule(_entrance(layout.mlp))
            handles.append(entrance.register_forward_pre_hook(leave, with_kwargs=True))
        try:
            reached = stream.run(layer, index)
        except _Enough:
            middle = _middle(layout, inputs, entry)
            assert middle is not None
            reached = middle
        finally:
            for handle in handles:
                handle.remove()
    return _written(layout.attention, inputs, entry), reached


class _Enough(Exception):
    """The layer has come as far as was asked."""


def _written(branch: Branch, inputs: Mapping[str, Tensor], entry: Tensor) -> Written:
    before = inputs[branch.norm_after].reshape(entry.shape) if branch.norm_after else None
    return Written(inputs[branch.consumer].reshape(*entry.shape[:2], -1), before)


def _middle(layout: LayerLayout, inputs: Mapping[str, Tensor], entry: Tensor) -> Tensor | None:
    """The stream between attention and MLP, or None where there is none."""
    if layout.mlp is None:
        return None
    middle, entered = inputs[_entrance(layout.mlp)], inputs[_entrance(layout.attention)]
    parallel = middle.data_ptr() == entered.data_ptr() or middle.data_ptr() == entry.data_ptr()
    return None if parallel else middle.reshape(entry.shape)


def _entrance(branch: Branch) -> str:
    return branch.norm or branch.producers[0].name


def _watched(layout: LayerLayout) -> set[str]:
    branches = [layout.attention] + ([layout.mlp] if layout.mlp is not None else [])
    names = {name for branch in branches for name in (_entrance(branch), branch.consumer, branch.norm_after)}
    return names - {""}


@contextmanager
def _inputs(layer: nn.Module, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """The first positional (or only) input of each module inside a layer, by name."""
    seen: dict[str, Tensor] = {}

    def keeper(name: str):  # type: ignore[no-untyped-def]
        def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen[name] = args[0] if args else kwargs["hidden_states"]

        return keep

    handles = [layer.get_submodule(name).register_forward_pre_hook(keeper(name), with_kwargs=True) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
