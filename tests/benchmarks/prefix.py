"""The dense model's stream before every layer, so that a student runs only from its first changed layer on.

    kept = Kept(model, batches)                     one pass of the dense model
    stream = kept.stream(student, start)            a Stream of the student that stands before layer `start` already

Holds for students whose layers below `start` are the dense model's. Memory: at most `ROOM`, else fewer boundaries are
kept and a student runs a little more.
"""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch
from lcprune.merging.streams import Stream, regrouped

ROOM = 1_500_000_000
"""Bytes that the streams kept of one text may take."""


class Ahead(Stream):
    """A stream that stands before layer `start`: the layers before it are passed without being run."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], states: Sequence[Tensor], start: int) -> None:
        super().__init__(model, batches)
        self.states = list(states)
        self.start = start
        self._behind = set(layers_of(model)[:start])

    def advance(self, layer: nn.Module) -> None:
        """Moves every batch through one layer, unless it stands behind that already."""
        if layer not in self._behind:
            super().advance(layer)


class Kept:
    """What the dense model makes of a text, boundary by boundary."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.text = regrouped(batches, model)
        self._states: dict[int, list[Tensor]] = {}
        layers = layers_of(model)
        stream = Stream(model, self.text)
        every = ceil(sum(state.nbytes for state in stream.states) * len(layers) / ROOM)
        for index, layer in enumerate(layers):
            if index % every == 0:
                self._states[index] = list(stream.states)
            stream.advance(layer)

    def stream(self, model: PreTrainedModel, start: int) -> Ahead:
        """The stream of a model whose layers before `start` are the dense model's, there or a little earlier."""
        start = max(index for index in self._states if index <= start)
        return Ahead(model, self.text, self._states[start], start)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers."""
    return layout_of(model.config).layers_of(model)


def first_changed(student: PreTrainedModel, dense: PreTrainedModel) -> int:
    """The first layer whose weights are not those of the dense model's layer in that place; the depth if none is."""
    for index, (mine, theirs) in enumerate(zip(layers_of(student), layers_of(dense), strict=False)):
        if not all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)):
            return index
    return len(layers_of(student))
