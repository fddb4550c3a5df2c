"""What a model does on a few batches of text: the statistics that plans are made from.

    collect(model, batches)       one pass, forward hooks -> LayerStats (cosines and angles of the residual stream)
    Calibration                   the statistics and the original model's last state, for one planning session

h_b is the residual stream at boundary b: h_0 the embeddings, h_b the output of layer b - 1. Layer outputs are read
with hooks, because the last of Hugging Face's `hidden_states` is taken after the final norm. Legend: `B` batch,
`T` tokens, `N` unmasked tokens of a batch, `D` hidden, `V` vocabulary, `L` layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging.activity import KnownActivity
from lcprune.merging.architectures import LayerLayout, layout_of
from lcprune.merging.checks import checked_batches
from lcprune.merging.double import in_double
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.packed import check_packable
from lcprune.merging.progress import track
from lcprune.merging.storages import Storages

Batch = Mapping[str, Tensor]
"""`input_ids` [B, T]; `attention_mask` [B, T] and `labels` [B, T] (-100 = not scored) where they are needed.

`position_ids` [B, T] where a row holds several documents: each begins at 0 and sees itself alone.
`counted`, bool [B, T], where statistics look at fewer tokens than the unmasked ones.
"""

Hook = Callable[[nn.Module, tuple[object, ...], Tensor | tuple[Tensor, ...]], None]
"""A forward hook of a decoder layer."""

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


def next_tokens(batch: Batch) -> Tensor:
    """Labels [B, T] moved by one: entry t is what position t has to predict, -100 where nothing counts.

    Without `labels` every token counts but the padding, and what a position of padding would predict.
    """
    labels_BT = batch.get("labels", batch["input_ids"])
    targets_BT = torch.cat([labels_BT[:, 1:], torch.full_like(labels_BT[:, :1], -100)], dim=1)
    if "attention_mask" not in batch:
        return targets_BT
    mask_BT = batch["attention_mask"].bool()
    both_BT = mask_BT & torch.cat([mask_BT[:, 1:], torch.zeros_like(mask_BT[:, :1])], dim=1)
    return targets_BT.masked_fill(~both_BT, -100)


def last_tokens(batches: Sequence[Batch]) -> list[Batch]:
    """The same batches, of which only the last unmasked token of every sequence counts.

    Of a row that holds several documents, the last of each.
    """
    ends: list[Batch] = []
    for batch in batches:
        mask_BT = _mask_or_ones(batch)
        if "position_ids" in batch:
            counted_BT = mask_BT & _before_an_end(mask_BT, batch["position_ids"])
        else:
            counted_BT = mask_BT & (mask_BT.flip(1).cumsum(1).flip(1) == 1)
        ends.append({**batch, "counted": counted_BT})
    return ends


def _mask_or_ones(batch: Batch) -> Tensor:
    mask_BT = mask_of(batch)
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask_BT is None else mask_BT


def _before_an_end(mask_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Which tokens have none of their own document behind them, bool [B, T]."""
    end_B1 = torch.ones_like(mask_BT[:, :1])
    return torch.cat([~mask_BT[:, 1:] | (positions_BT[:, 1:] == 0), end_B1], dim=1)


def tokens_in(batch: Batch) -> int:
    """How many tokens of a batch count."""
    mask_BT = mask_of(batch)
    return batch["input_ids"].numel() if mask_BT is None else int(mask_BT.sum())


def unmasked(state_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The states [N, D] of the tokens that count."""
    return state_BTD.flatten(0, 1) if mask_BT is None else state_BTD[mask_BT.to(state_BTD.device)]


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The last state [B, T, D] after the final norm: the forward pass without the head.

    Raises:
        InputError: Rows hold several documents, and this model's attention would not keep them apart.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    if "position_ids" in inputs:
        check_packable(model.config, len(inputs["input_ids"]))
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    state: Tensor = model.get_decoder()(**inputs, use_cache=False, return_dict=True).last_hidden_state
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

    Logits exist for `HEAD_CHUNK` tokens at a time. What is scored, `next_tokens` says.
    """
    targets_BT = next_tokens(batch).to(state_BTD.device)
    keep_BT = targets_BT != -100
    states_ND, targets = state_BTD[keep_BT], targets_BT[keep_BT]
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
    return sums.stats(batches, model.dtype)


class SpanSums:
    """Sums of cosines and angles between the stream at boundary b and at b + n, in whatever order they come."""

    def __init__(self, spans: Sequence[int], depth: int) -> None:
        """All sums at zero; raises InputError for a span that the model does not have.

        Args:
            spans: Distances n in layers.
            depth: Layers of the model.
        """
        if not 1 <= min(spans) <= max(spans) <= depth:
            raise InputError(
                f"spans={list(spans)} must lie between 1 and the model's {depth} layers: compare states less far apart."
            )
        self._sums = {n: torch.zeros(2, depth + 1 - n, dtype=torch.float64) for n in spans}

    def add(self, span: int, boundary: int, before_ND: Tensor, after_ND: Tensor) -> None:
        """Adds one batch's tokens: the stream at `boundary` and at `boundary + span`, in float32."""
        cos_N = in_double(cosine_similarity(before_ND, after_ND, dim=-1).clamp(-1, 1))
        self._sums[span][0, boundary] += cos_N.sum().cpu()
        self._sums[span][1, boundary] += (cos_N.arccos() / torch.pi).sum().cpu()

    def stats(self, batches: Sequence[Batch], dtype: torch.dtype) -> LayerStats:
        """The means over all tokens that count of the batches that were added; raises InputError if one is no number.

        Args:
            batches: All of them.
            dtype: Of the model's weights, for the error.
        """
        tokens = sum(map(tokens_in, batches))
        if not tokens:
            raise InputError("No token of the calibration text counts (all are padding): give text that is.")
        broken = [b + n - 1 for n, total in self._sums.items() for b in (~total[0].isfinite()).nonzero().flatten()]
        if broken:
            way = "the model is broken or has diverged, fetch it anew or go back to an earlier checkpoint"
            if dtype == torch.float16:
                way = "choose bfloat16 or float32, with --dtype or model.dtype (in fit trainer.precision, too)"
            name = str(dtype).removeprefix("torch.")
            raise InputError(f"The stream behind layer {min(broken)} is no number in {name}: {way}.")
        cosine = {n: tuple((total[0] / tokens).tolist()) for n, total in self._sums.items()}
        angle = {n: tuple((total[1] / tokens).tolist()) for n, total in self._sums.items()}
        return LayerStats(cosine, angle, tokens)


@dataclass(frozen=True)
class Calibration:
    """Everything a planner may look at: the model as it stands, the text, the original model, the history so far.

    What was measured is answered without another pass for as long as the model's weights are the same (see `Storages`).
    """

    model: PreTrainedModel
    """The student that will be merged; planners leave it as they found it."""
    batches: Sequence[Batch]
    """Calibration batches."""
    original: PreTrainedModel | None = None
    """The model before its first merge, if `model` has been merged already."""
    history: MergeHistory | None = None
    """How `model` came from the original; None = not merged yet."""
    known: KnownActivity = field(default_factory=KnownActivity, repr=False)
    """Activity that planners measured on all of the text, which executing the plan need not measure again."""
    _stats: dict[tuple[int, ...], tuple[Storages, LayerStats]] = field(default_factory=dict, repr=False)
    _scores: dict[str, tuple[Storages, tuple[float, ...]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", checked_batches(self.batches))
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
        return self.past.lineage

    @property
    def past(self) -> MergeHistory:
        """The history so far; an empty one of a model that was not merged yet."""
        return self.history if self.history is not None else MergeHistory(self.depth)

    def layer_tensors(self, index: int) -> Mapping[str, Tensor]:
        """The parameters of one layer of the model as it is, by their names inside the layer; not to be changed."""
        layer = self.layout.layers_of(self.model)[index]
        return {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def stats(self, *spans: int) -> LayerStats:
        """`collect` for at least these spans, once for a model as it stands."""
        for known, (storages, stats) in self._stats.items():
            if set(spans) <= set(known) and storages.are_those_of(self.model):
                return stats
        self._stats[spans] = Storages(self.model), self.collect(spans)
        return self._stats[spans][1]

    def collect(self, spans: Sequence[int]) -> LayerStats:
        """One pass of the model as it stands."""
        return collect(self.model, self.batches, spans)

    def check_stream(self, figures: Iterable[float]) -> None:
        """Raises InputError if figures of the model as it stands are no numbers because its stream is none."""
        if not all(map(isfinite, figures)):
            collect(self.model, self.batches)

    def scores(self, name: str, score: Callable[["Calibration"], tuple[float, ...]]) -> tuple[float, ...]:
        """`score(self)`, once for each name and model: planning to several depths judges the layers only once."""
        if name not in self._scores or not self._scores[name][0].are_those_of(self.model):
            self._scores[name] = Storages(self.model), score(self)
        return self._scores[name][1]

    @cached_property
    def reference(self) -> tuple[Tensor, ...]:
        """The original model's last states [B, T, D], after the final norm, batch by batch."""
        model = self.original if self.original is not None else self.model
        with evaluating(model):
            return tuple(hidden_states(model, batch) for batch in track(self.batches, "running the original model"))

    def know_reference(self, states: Sequence[Tensor]) -> None:
        """Takes last states that a pass of the original has brought, so that `reference` needs none of its own."""
        vars(self).setdefault("reference", tuple(states))
