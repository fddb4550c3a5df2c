"""The residual stream before the layers of a model, kept: a candidate reruns only what it changes.

    prefixes = prefixes_of(calibration, highest)     one pass
    prefixes.run(start)                              last states of the model as it is now, layers from `start` on run

Masks and rotary embeddings that a layer is called with are kept by its kind. Legend: `B` batch, `T` tokens, `D` hidden.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil

from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, Calibration, evaluating, hidden_states, stream_of
from lcprune.merging.progress import track

ROOM = 1.0
"""What is kept takes at most so many times the memory of the model's weights, as long as the embeddings alone do."""

_ByKind = dict[tuple[object, ...], Mapping[str, object]]


def prefixes_of(calibration: Calibration, highest: int, every: int = 1) -> "PrefixCache":
    """The stream before layers 0 .. `highest` of the model as it is, kept before every so-manieth, or fewer (`ROOM`).

    Where the model is not merged yet this is the original's pass too: it need not run again to be compared with. Raises
    InputError for a stream that is not finite.
    """
    every = max(every, affordable(calibration.model, calibration.batches, highest))
    cache = PrefixCache(calibration.model, calibration.batches, highest, every)
    calibration.check_stream(state.abs().max().item() for state in cache.last)
    if calibration.original is None:
        calibration.know_reference(cache.last)
    return cache


def affordable(model: PreTrainedModel, batches: Sequence[Batch], highest: int) -> int:
    """Before every how-manieth layer of 0 .. `highest` the stream can be kept within `ROOM`."""
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    one = tokens * model.config.hidden_size * model.dtype.itemsize
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return ceil((highest + 1) * one / (ROOM * weights))


class PrefixCache:
    """The residual stream before every layer of a model, batch by batch.

    A candidate that changes the model from layer `l` on is measured by running only the layers from there
    (`LaCo`'s and `SLEB`'s searches). Memory: batches x (1 + (highest + 1) / every) states [B, T, D].
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], highest: int, every: int = 1) -> None:
        """Runs the batches once.

        Args:
            model: A causal LM of a known family.
            batches: Calibration batches.
            highest: The last layer before which the stream is kept.
            every: Kept before every so-manieth layer only; from there the layers up to the one asked for run again.
        """
        self._every = every
        self._model, self._layout = model, layout_of(model.config)
        self._batches = batches
        self.last: list[Tensor] = []
        """The recorded model's last states [B, T, D], after the final norm, batch by batch."""
        self._states: list[list[Tensor]] = []
        # Masks and rotary embeddings differ between kinds of layers; a layer's number, and even the kind of a module,
        # may change when others are merged into it.
        self._arguments: list[_ByKind] = []
        self._record(highest)

    def _record(self, highest: int) -> None:
        layers = self._layout.layers_of(self._model)

        def before(index: int) -> Callable[..., None]:
            kind = self._layout.kind_of(self._model.config, index)

            def keep(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
                named = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
                state = named.pop("hidden_states")
                assert isinstance(state, Tensor)
                self._arguments[-1][kind] = named
                if index <= highest and index % self._every == 0:
                    self._states[-1].append(state)

            return keep

        handles = [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(layers)]
        try:
            with evaluating(self._model):
                for batch in track(self._batches, "keeping the stream before every layer"):
                    self._states.append([])
                    self._arguments.append({})
                    self.last.append(hidden_states(self._model, batch))
        finally:
            for handle in handles:
                handle.remove()

    def forget_from(self, index: int) -> None:
        """Frees the stream before layer `index` and later; for searches that only move towards the input."""
        for states in self._states:
            del states[-(-index // self._every) :]

    def refresh(self, start: int) -> None:
        """Keeps the stream behind layer `start` anew, after a merge there; the streams before it still hold."""
        kept = start // self._every + 1
        for states, arguments in zip(self._states, self._arguments, strict=True):
            del states[kept:]
            for index in range(kept * self._every, len(self._layout.layers_of(self._model)), self._every):
                states.append(self._through(states[-1], arguments, index - self._every, index))

    def _through(self, state: Tensor, arguments: _ByKind, start: int, end: int) -> Tensor:
        """What layers start .. end - 1 of the model as it is make of a state."""
        layers = self._layout.layers_of(self._model)
        with evaluating(self._model):
            for index in range(start, end):
                kind = self._layout.kind_of(self._model.config, index)
                state = stream_of(layers[index](state, **arguments[kind]))
        return state

    def _before(self, states: Sequence[Tensor], arguments: _ByKind, index: int) -> Tensor:
        """One batch's stream before layer `index`; the layers below it are as they were when it was kept."""
        place = index // self._every
        return self._through(states[place], arguments, place * self._every, index)

    def before(self, index: int) -> Iterator[tuple[Tensor, Mapping[str, object]]]:
        """The stream [B, T, D] before layer `index` and what else that layer is called with, batch by batch."""
        kind = self._layout.kind_of(self._model.config, index)
        for states, arguments in zip(self._states, self._arguments, strict=True):
            yield self._before(states, arguments, index), arguments[kind]

    def run(self, start: int, entry: int | None = None) -> Iterator[Tensor]:
        """The last state [B, T, D] after the final norm, batch by batch, from layer `start` of the model as it is.

        Args:
            start: First layer that runs, numbered as the layers stand now.
            entry: Which cached stream it gets: the one before layer `entry` of the model that was recorded
                (default: `start`). `run(l + 1, entry=l)` is the model without layer l.
        """
        norm = self._model.get_submodule(self._layout.final_norm)
        layers = self._layout.layers_of(self._model)
        for states, arguments in zip(self._states, self._arguments, strict=True):
            state = self._before(states, arguments, start if entry is None else entry)
            state = self._through(state, arguments, start, len(layers))
            with evaluating(self._model):
                state = norm(state)
            yield state
