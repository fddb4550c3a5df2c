"""What layers of a model do on text, measured again whenever the model has changed.

    measure_activity(model, batches, (13, 14))     once; layers behind the last one asked for do not run

    trail = Trail(model, batches)                  again and again, between merges
    surgery.apply(model, step, trail.activity)     of the members, as the model stands before the merge
    trail.forget(step.base)                        only what lies behind the merge will run again

    boundary    0     4     8     12 13    16 ...            every fourth one's stream is kept, and two where the last
                *-----*-----*-----*--*-----*-----            walk began and two where it ended: it may go on at either

Memory of a trail: the calibration text's states [B, T, D] at a quarter of the boundaries. Boundary b is the stream
before layer b. Legend: `B` batch, `T` tokens, `D` hidden.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from lcprune.merging.activity import Activity, kv_heads_of, recording
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch
from lcprune.merging.streams import Stream, regrouped

KEPT_EVERY = 4
"""Distance in layers between the streams that a trail keeps: fewer cost memory, more cost layers that run again."""


def measure_activity(model: PreTrainedModel, batches: Sequence[Batch], wanted: Sequence[int]) -> tuple[Activity, ...]:
    """The activity of the layers `wanted`, in the order named, in one pass that ends behind the last of them."""
    layout = layout_of(model.config)
    layers = layout.layers_of(model)
    stream = Stream(model, batches)
    with recording([layers[index] for index in wanted], layout, kv_heads_of(model.config)) as recorder:
        for place, (state, mask_BT) in enumerate(zip(stream.states, stream.masks, strict=True)):
            recorder.mask_BT = mask_BT
            for layer in layers[: max(wanted) + 1]:
                state = stream.run(layer, place, state)
    return recorder.activities()


class Trail:
    """The stream along a model's layers, kept at some of them, so that a walk after a merge begins close to it."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], *, recorded: bool = True) -> None:
        """Runs nothing yet.

        Args:
            model: A causal LM of a known family; whoever merges its layers says so with `forget`.
            batches: Calibration batches.
            recorded: Whether the activity of every layer is recorded as the text passes it; not where MLPs consist
                of experts.
        """
        self.batches = regrouped(batches, model)
        """The same text in batches of a size that suits the processor."""
        self._model, self._layout, self._recorded = model, layout_of(model.config), recorded
        self._stream: Stream | None = None
        self._kept: dict[int, list[Tensor]] = {}
        self._activity: dict[int, Activity] = {}

    def activity(self, wanted: Sequence[int]) -> tuple[Activity, ...]:
        """The activity of these layers of the model as it stands, in the order named; runs only what is not known."""
        assert self._recorded, "this trail records no activity"
        unknown = [index for index in wanted if index not in self._activity]
        if unknown:
            for _ in self.walk(min(unknown), max(unknown) + 1):
                pass
        return tuple(self._activity[index] for index in wanted)

    def forget(self, base: int) -> None:
        """Says that layers from `base` on have merged or changed."""
        self._activity = {index: one for index, one in self._activity.items() if index < base}
        self._kept = {boundary: states for boundary, states in self._kept.items() if boundary <= base}

    def walk(self, start: int, stop: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Boundaries `start` to `stop` with the stream there, one state [B, T, D] for every one of `batches`."""
        stream = self._here()
        nearest = max(boundary for boundary in self._kept if boundary <= start)
        stream.states = list(self._kept[nearest])
        self._kept = {b: s for b, s in self._kept.items() if b % KEPT_EVERY == 0 or abs(b - start) <= 1}
        for boundary in range(nearest, stop + 1):
            if boundary > nearest:
                self._pass(stream, boundary - 1)
            states = list(stream.states)
            if boundary % KEPT_EVERY == 0 or boundary in (start, start + 1, stop - 1, stop):
                self._kept[boundary] = states
            if boundary >= start:
                yield boundary, states

    def last_states(self, base: int, states: Sequence[Tensor]) -> Iterator[Tensor]:
        """The last state [B, T, D] of every batch, after the final norm, from its state before layer `base` on."""
        stream = self._here()
        stream.states = list(states)
        return stream.last_states(*self._layout.layers_of(self._model)[base:])

    def _here(self) -> Stream:
        if self._stream is None:
            self._stream = Stream(self._model, self.batches)
            self._kept[0] = list(self._stream.states)
        return self._stream

    def _pass(self, stream: Stream, index: int) -> None:
        """Moves all text through one layer and notes what it does there."""
        layer = self._layout.layers_of(self._model)[index]
        if not self._recorded or index in self._activity:
            stream.advance(layer)
            return
        with recording([layer], self._layout, kv_heads_of(self._model.config)) as recorder:
            for place, mask_BT in enumerate(stream.masks):
                recorder.mask_BT = mask_BT
                stream.step(layer, place)
        stream.leave(layer)
        (self._activity[index],) = recorder.activities()
