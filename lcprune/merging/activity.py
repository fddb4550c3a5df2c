"""What a layer's heads and channels do on text: the statistics by which `Concat` chooses among them.

    with recording(layers, layout, kv_heads) as recorder:    # forward pre-hooks on the output projections
        recorder.mask_BT = batch.get("attention_mask")       # before every pass
        model(...)
    recorder.activities()                                    # one Activity per layer

Only mean |x| per input of an output projection is kept: what an input contributes is |x| times the absolute sum of
the weights that read it, and the weights do not change from token to token (`Concat` multiplies once). Legend: `B`
batch, `T` tokens, `N` unmasked tokens, `K` KV heads, `I` inputs of the attention's output projection, `F` channels of
the MLP.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lcprune.merging.architectures import LayerLayout, layout_of
from lcprune.merging.lineage import MergeStep


@dataclass(frozen=True)
class Activity:
    """Means over all unmasked calibration tokens, of one layer."""

    heads_KI: Tensor
    """[K, I / K] mean absolute input of the attention's output projection, grouped by KV head; float32."""
    channels_F: Tensor
    """[F] mean absolute input of the MLP's down projection; float32."""


Measure: TypeAlias = Callable[[Sequence[int]], Sequence[Activity]]
"""The activity of these layers of a model as it stands, in the order named."""


class KnownActivity:
    """What was measured of one model on one text, by the merges that went before."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Activity, ...]] = {}

    def note(self, before: Sequence[MergeStep], wanted: Sequence[int], activity: Sequence[Activity]) -> None:
        """Keeps the activity of these layers of the model after the steps `before`."""
        self._found[_key(before, wanted)] = tuple(activity)

    def find(self, before: Sequence[MergeStep], wanted: Sequence[int]) -> tuple[Activity, ...] | None:
        """The activity of these layers after the same merges, None if it was not measured."""
        return self._found.get(_key(before, wanted))


def _key(before: Sequence[MergeStep], wanted: Sequence[int]) -> str:
    """What weights and numbers of layers follow from; not what a plan only says beside."""
    return json.dumps([[(step.group, step.operator, step.shares, step.refit) for step in before], list(wanted)])


class Recorder:
    """Sums |x| over forward passes, for the two output projections of every layer it was made for."""

    def __init__(self, number: int, kv_heads: int) -> None:
        self.mask_BT: Tensor | None = None
        """Tokens of the next pass that count; None = all."""
        self._kv_heads = kv_heads
        self._sums: list[dict[str, Tensor]] = [{} for _ in range(number)]
        self._tokens: list[dict[str, int]] = [{} for _ in range(number)]

    def see(self, index: int, projection: str, x: Tensor) -> None:
        """Adds one pass.

        Args:
            index: Which layer, counted as they were given.
            projection: `attention` or `mlp`.
            x: The projection's input, [B, T, inputs] or [B * T, inputs].
        """
        x_NI = x.flatten(0, -2)
        if self.mask_BT is not None:
            x_NI = x_NI[self.mask_BT.flatten().bool().to(x.device)]
        sum_I = x_NI.abs().sum(0, dtype=torch.float32)
        sums, tokens = self._sums[index], self._tokens[index]
        sums[projection] = sums[projection] + sum_I if projection in sums else sum_I
        tokens[projection] = tokens.get(projection, 0) + len(x_NI)

    def activities(self) -> tuple[Activity, ...]:
        """The means so far, layer by layer."""
        assert all(tokens.keys() == {"attention", "mlp"} for tokens in self._tokens), "a layer did not run"
        means = [
            {name: sums[name] / tokens[name] for name in sums}
            for sums, tokens in zip(self._sums, self._tokens, strict=True)
        ]
        return tuple(Activity(mean["attention"].reshape(self._kv_heads, -1), mean["mlp"]) for mean in means)


@contextmanager
def recording(layers: Sequence[nn.Module], layout: LayerLayout, kv_heads: int) -> Iterator[Recorder]:
    """Records what reaches the output projections of `layers` during forward passes inside the block.

    Args:
        layers: Decoder layers of one model.
        layout: The family's record; one with an MLP of channels.
        kv_heads: Number of KV heads, see `kv_heads_of`.
    """
    assert layout.mlp is not None, f"{layout.model_type} has no MLP of channels"
    recorder = Recorder(len(layers), kv_heads)
    consumers = {"attention": layout.attention.consumer, "mlp": layout.mlp.consumer}

    def seer(index: int, projection: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: recorder.see(index, projection, args[0])

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            for projection, name in consumers.items():
                handle = layer.get_submodule(name).register_forward_pre_hook(seer(index, projection))
                hooks.callback(handle.remove)
        yield recorder


def kv_heads_of(config: PretrainedConfig) -> int:
    """Number of KV heads of a layer, by the family's record."""
    return layout_of(config).kv_heads_of(config)
