"""What a model does on a few batches of text: the statistics that plans are made from.

    collect(model, batches)       one pass, forward hooks -> LayerStats (cosines and angles of the residual stream)
    PrefixCache(model, batches)   the stream before every layer, so that a candidate reruns only what it changes
    Calibration                   both of these, and the original model's last state, for one planning session

h_b is the residual stream at boundary b: h_0 the embeddings, h_b the output of layer b - 1. Layer outputs are read
with hooks, because the last of Hugging Face's `hidden_states` is taken after the final norm. Legend: `B` batch,
`T` tokens, `N` unmasked tokens of a batch, `D` hidden, `V` vocabulary, `L` layers.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging.architectures import LayerLayout, layout_of
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.progress import track

Batch = Mapping[str, Tensor]
"""`input_ids` [B, T]; `attention_mask` [B, T] and `labels` [B, T] (-100 = not scored) where they are needed.

`counted`, bool [B, T], where statistics look at fewer tokens than the unmasked ones.
"""

Hook = Callable[[nn.Module, tuple[object, ...], Tensor | tuple[Tensor, ...]], None]
"""A forward hook of a decoder layer."""

_ByKind = dict[tuple[object, ...], Mapping[str, object]]
HEAD_CHUNK = 1024
"""Tokens whose logits exist at once when a loss is measured."""

HEAD_FIELDS = ("logit_scale", "logits_scaling", "final_logit_softcapping")
"""Config fields of what a head does to its logits: factor (cohere), divisor (granite), soft cap (gemma2)."""


@dataclass(frozen=True)
class LayerStats:
    """How the residual stream changes over spans of layers, averaged over all calibration tokens."""

    cosine: Mapping[int, tuple[float, ...]]
    """Span n -> mean of cos(h_b, h_{b+n}) for b = 0 .. L-n."""
    angle: Mapping[int, tuple[float, ...]]
    """Span n -> mean of arccos(cos(h_b, h_{b+n})) / pi, in units of half a turn, for b = 0 .. L-n."""
    tokens: int
    """Number of tokens behind the means."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def layer_outputs(layers: nn.ModuleList, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects h after the layers `wanted` (by index) during forward passes inside the block.

    Example:
        >>> with layer_outputs(model.model.layers, [3]) as states:
        ...     model(input_ids)
        >>> states[3].shape
        torch.Size([B, T, D])
    """
    states: dict[int, Tensor] = {}

    def keeper(index: int) -> Hook:
        def keep(module: nn.Module, args: tuple[object, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            states[index] = stream_of(output)

        return keep

    handles = [layers[index].register_forward_hook(keeper(index)) for index in wanted]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def stream_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The residual stream in what a decoder layer returns (some families return a tuple)."""
    return output[0] if isinstance(output, tuple) else output


def mask_of(batch: Batch) -> Tensor | None:
    """Which tokens count, bool [B, T]; None = all."""
    if "counted" in batch:
        return batch["counted"]
    return batch["attention_mask"].bool() if "attention_mask" in batch else None


def last_tokens(batches: Sequence[Batch]) -> list[Batch]:
    """The same batches, of which only the last unmasked token of every sequence counts."""
    ends: list[Batch] = []
    for batch in batches:
        mask_BT = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        behind_BT = mask_BT.flip(1).cumsum(1).flip(1)
        ends.append({**batch, "counted": mask_BT & (behind_BT == 1)})
    return ends


def unmasked(state_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The states [N, D] of the tokens that count."""
    return state_BTD.flatten(0, 1) if mask_BT is None else state_BTD[mask_BT.to(state_BTD.device)]


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The last state [B, T, D] after the final norm: the forward pass without the head."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    state: Tensor = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return state


def logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """What the model's own head makes of last states [..., D], with its family's bias, scaling and soft-capping."""
    values: Tensor = model.get_output_embeddings()(states)
    factor, divisor, cap = (getattr(model.config, name, None) for name in HEAD_FIELDS)
    if factor is not None:
        values = values * factor
    if divisor is not None:
        values = values / divisor
    return values if cap is None else torch.tanh(values / cap) * cap


@torch.no_grad()
def token_loss(model: PreTrainedModel, state_BTD: Tensor, batch: Batch) -> tuple[float, int]:
    """Sum of next-token cross-entropies in nats, and over how many tokens, from the last state.

    Logits exist for `HEAD_CHUNK` tokens at a time. Without `labels` every token after the first is scored.
    """
    labels_BT = batch.get("labels", batch["input_ids"])
    targets = labels_BT[:, 1:].reshape(-1).to(state_BTD.device)
    states_ND = state_BTD[:, :-1].reshape(-1, state_BTD.shape[-1])
    keep = targets != -100
    states_ND, targets = states_ND[keep], targets[keep]
    total = 0.0
    for states, labels in zip(states_ND.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        total += cross_entropy(logits(model, states).float(), labels, reduction="sum").item()
    return total, len(targets)


def collect(model: PreTrainedModel, batches: Sequence[Batch], spans: Sequence[int] = (1,)) -> LayerStats:
    """Runs the batches through the decoder and averages cosines and angles over all tokens that count.

    Args:
        model: A causal LM of a known family; not changed.
        batches: Calibration batches.
        spans: Distances in layers at which the stream is compared with itself; the longest decides how many
            states [B, T, D] are alive at once.
    """
    layers = layout_of(model.config).layers_of(model)
    sums = SpanSums(spans, len(layers))
    window: dict[int, Tensor] = {}
    current: Batch = {}

    def see(boundary: int, state_BTD: Tensor) -> None:
        window[boundary] = unmasked(state_BTD, mask_of(current)).float()
        for n in spans:
            if boundary - n in window:
                sums.add(n, boundary - n, window[boundary - n], window[boundary])
        window.pop(boundary - max(spans), None)

    def before_first(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        see(0, args[0] if args else kwargs["hidden_states"])

    def after(index: int) -> Hook:
        return lambda module, args, output: see(index + 1, stream_of(output))

    handles = [layers[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [layer.register_forward_hook(after(index)) for index, layer in enumerate(layers)]
    try:
        with evaluating(model):
            for current in track(batches, "reading calibration text"):
                window.clear()
                hidden_states(model, current)
    finally:
        for handle in handles:
            handle.remove()
    return sums.stats(batches)


class SpanSums:
    """Sums of cosines and angles between the stream at boundary b and at b + n, in whatever order they come."""

    def __init__(self, spans: Sequence[int], depth: int) -> None:
        """All sums at zero; raises InputError for a span that the model does not have.

        Args:
            spans: Distances n in layers.
            depth: Layers of the model.
        """
        if not 1 <= min(spans) <= max(spans) <= depth:
            raise InputError(f"spans={list(spans)} must lie between 1 and the model's {depth} layers.")
        self._sums = {n: torch.zeros(2, depth + 1 - n, dtype=torch.float64) for n in spans}

    def add(self, span: int, boundary: int, before_ND: Tensor, after_ND: Tensor) -> None:
        """Adds one batch's tokens: the stream at `boundary` and at `boundary + span`, in float32."""
        cos_N = cosine_similarity(before_ND, after_ND, dim=-1).clamp(-1, 1)
        self._sums[span][0, boundary] += cos_N.double().sum().cpu()
        self._sums[span][1, boundary] += (cos_N.double().arccos() / torch.pi).sum().cpu()

    def stats(self, batches: Sequence[Batch]) -> LayerStats:
        """The means over all tokens that count of the batches that were added."""
        masks = ((mask_of(batch), batch["input_ids"]) for batch in batches)
        tokens = sum(ids_BT.numel() if mask_BT is None else int(mask_BT.sum()) for mask_BT, ids_BT in masks)
        cosine = {n: tuple((total[0] / tokens).tolist()) for n, total in self._sums.items()}
        angle = {n: tuple((total[1] / tokens).tolist()) for n, total in self._sums.items()}
        return LayerStats(cosine, angle, tokens)


class PrefixCache:
    """The residual stream before every layer of a model, batch by batch.

    A candidate that changes the model from layer `l` on is measured by running only the layers from there
    (`LaCo`'s and `SLEB`'s searches). Memory: batches x (highest + 1) / every states [B, T, D].
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


@dataclass(frozen=True)
class Calibration:
    """Everything a planner may look at: the model as it stands, the text, the original model, the history so far."""

    model: PreTrainedModel
    """The student that will be merged; planners leave it as they found it."""
    batches: Sequence[Batch]
    """Calibration batches."""
    original: PreTrainedModel | None = None
    """The model before its first merge, if `model` has been merged already."""
    history: MergeHistory | None = None
    """How `model` came from the original; None = not merged yet."""
    _stats: dict[tuple[int, ...], LayerStats] = field(default_factory=dict, repr=False)
    _scores: dict[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.batches:
            raise InputError("There are no calibration batches: set data.calibration_blocks to 1 or more.")

    @property
    def layout(self) -> LayerLayout:
        """The record of the model's family."""
        return layout_of(self.model.config)

    @property
    def depth(self) -> int:
        """Number of layers the model has now."""
        return len(self.layout.layers_of(self.model))

    @property
    def lineage(self) -> tuple[tuple[int, ...], ...]:
        """Teacher layers of every layer the model has now."""
        return self.history.lineage if self.history is not None else MergeHistory(self.depth).lineage

    def layer_tensors(self, index: int) -> Mapping[str, Tensor]:
        """The parameters of one layer of the model as it is, by their names inside the layer; not to be changed."""
        layer = self.layout.layers_of(self.model)[index]
        return {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def stats(self, *spans: int) -> LayerStats:
        """`collect` for at least these spans, once."""
        for known, stats in self._stats.items():
            if set(spans) <= set(known):
                return stats
        self._stats[spans] = collect(self.model, self.batches, spans)
        return self._stats[spans]

    def scores(self, name: str, score: Callable[["Calibration"], tuple[float, ...]]) -> tuple[float, ...]:
        """`score(self)`, once for each name: planning to several depths judges the layers only once."""
        if name not in self._scores:
            self._scores[name] = score(self)
        return self._scores[name]

    @cached_property
    def reference(self) -> tuple[Tensor, ...]:
        """The original model's last states [B, T, D], after the final norm, batch by batch."""
        model = self.original if self.original is not None else self.model
        with evaluating(model):
            return tuple(hidden_states(model, batch) for batch in track(self.batches, "running the original model"))

    def prefixes(self, highest: int, every: int = 1) -> PrefixCache:
        """The stream before layers 0 .. `highest` of the model as it is, kept before every so-manieth."""
        cache = PrefixCache(self.model, self.batches, highest, every)
        if self.original is None:
            # That pass was the original model's: it need not run again to be compared with.
            vars(self).setdefault("reference", tuple(cache.last))
        return cache
