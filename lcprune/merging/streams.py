"""The residual stream of a model over all calibration batches, moved through the layers by hand.

    stream = Stream(model, batches)             embeddings; no layer has run
    stream.advance(layers[0])                   ... now every batch stands after layer 0
    for state in stream.last_states(): ...      after the final norm

Refits walk a student and its teacher side by side this way, and searches try a layer out without running the layers
below it again. Memory: one state [B, T, D] per batch. Legend: `B` batch, `T` tokens, `D` hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, evaluating, hidden_states, mask_of, stream_of
from lcprune.merging.packed import one_packed_row

TOKENS_AT_ONCE = 512
"""Tokens that run through a layer together; fewer leave the processor waiting for the weights, more outgrow its caches
and leave holes in the memory of a process."""

Arguments = tuple[tuple[object, ...], Mapping[str, object]]
"""What a layer is called with beside the state, by position and by name: masks, positions, rotary embeddings."""


class Stream:
    """Where every calibration batch stands in one model. Layers may be merged while it moves on."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Embeds the batches; takes from the model's own forward pass what it hands to each layer.

        Args:
            model: A causal LM of a known family.
            batches: Calibration batches.
        """
        layout = layout_of(model.config)
        self.model = model
        self.states: list[Tensor] = []
        """The state [B, T, D] of every batch."""
        self.masks: list[Tensor | None] = []
        """Which tokens of every batch count, [B, T], where its state is; None = all."""
        self._layers = layout.layers_of(model)
        self._norm = layout.final_norm
        self._kinds = {layer: self._kind_of(layer) for layer in self._layers}
        # By the module, not by its number: numbers move when layers go, modules do not.
        self._arguments: list[dict[nn.Module, Arguments]] = []
        with evaluating(model), _passing_through(self._layers) as calls:
            for batch in batches:
                calls.clear()
                hidden_states(model, batch)
                state, mask_BT = calls[0][1], mask_of(batch)
                self.states.append(state)
                self.masks.append(None if mask_BT is None else mask_BT.to(state.device))
                self._arguments.append({module: arguments for module, _, arguments in calls})

    def run(self, layer: nn.Module, index: int, state: Tensor | None = None) -> Tensor:
        """What `layer` makes of batch `index`, which stays where it is; in eval mode, without gradients."""
        positional, named = self._arguments[index][self._like(layer)]
        with evaluating(layer):
            return stream_of(layer(self.states[index] if state is None else state, *positional, **named))

    def _kind_of(self, layer: nn.Module) -> tuple[object, ...]:
        number = next(number for number, other in enumerate(self._layers) if other is layer)
        return layout_of(self.model.config).kind_of(self.model.config, number)

    def _like(self, layer: nn.Module) -> nn.Module:
        """Whose masks and positions are the layer's: a merge may have made it one of another kind."""
        kind = self._kind_of(layer)
        return layer if self._kinds[layer] == kind else next(other for other, its in self._kinds.items() if its == kind)

    def advance(self, layer: nn.Module) -> None:
        """Moves every batch through one layer."""
        for index in range(len(self.states)):
            self.step(layer, index)
        self.leave(layer)

    def step(self, layer: nn.Module, index: int) -> None:
        """Moves one batch through one layer; `leave` must follow once all have moved."""
        self.states[index] = self.run(layer, index)

    def leave(self, layer: nn.Module) -> None:
        """Says that no batch will pass this layer again."""

    def last_states(self, *layers: nn.Module) -> Iterator[Tensor]:
        """The last state [B, T, D] of every batch after these layers and the final norm; nothing moves."""
        norm = self.model.get_submodule(self._norm) if self._norm else nn.Identity()
        for index, state in enumerate(self.states):
            for layer in layers:
                state = self.run(layer, index, state)
            with evaluating(norm):
                yield norm(state)


class FadingStream(Stream):
    """The stream of a model that is not needed any more: a layer's weights are freed once every batch is past it."""

    def leave(self, layer: nn.Module) -> None:
        """Empties the layer."""
        for parameter in layer.parameters():
            parameter.data = parameter.data.new_empty(0)


def one_by_one(batches: Sequence[Batch]) -> list[Batch]:
    """The same sequences, one to a batch."""
    return [
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ]


def regrouped(batches: Sequence[Batch], model: PreTrainedModel, tokens: int = TOKENS_AT_ONCE) -> list[Batch]:
    """The same sequences in batches of about so many tokens; sequences of different lengths stay apart.

    So do rows of several documents where the model's attention keeps these apart in one row at a time.
    """
    single = one_packed_row(model.config)
    runs: list[list[Batch]] = []
    for batch in batches:
        fits = (
            runs
            and not (single and "position_ids" in batch)
            and runs[-1][-1]["input_ids"].shape[1] == batch["input_ids"].shape[1]
            and runs[-1][-1].keys() == batch.keys()
            and sum(b["input_ids"].numel() for b in runs[-1]) + batch["input_ids"].numel() <= tokens
        )
        if fits:
            runs[-1].append(batch)
        else:
            runs.append([batch])
    return [{name: torch.cat([batch[name] for batch in run]) for name in run[0]} for run in runs]


@contextmanager
def _passing_through(layers: nn.ModuleList) -> Iterator[list[tuple[nn.Module, Tensor, Arguments]]]:
    """Layers hand on their input and note what they were called with: a forward pass that costs the embeddings."""
    calls: list[tuple[nn.Module, Tensor, Arguments]] = []
    as_tuple: list[bool] = []
    true_forward = layers[0].forward

    def stand_in(layer: nn.Module):  # type: ignore[no-untyped-def]
        def forward(*args: Tensor, **kwargs: object) -> object:
            if not as_tuple:
                # Some families' layers return a tuple, others the state: the first call is made to find out.
                as_tuple.append(isinstance(true_forward(*args, **kwargs), tuple))
            named = dict(kwargs)
            state = args[0] if args else named.pop("hidden_states")
            assert isinstance(state, Tensor)
            calls.append((layer, state, (args[1:], named)))
            return (state,) if as_tuple[0] else state

        return forward

    with ExitStack() as stack:
        for layer in layers:
            if "forward" in vars(layer):
                stack.callback(setattr, layer, "forward", layer.forward)
            else:
                stack.callback(delattr, layer, "forward")
            layer.forward = stand_in(layer)  # type: ignore[method-assign]
        yield calls
