"""What layers do on text, from whole forward passes of transformers: the oracle of whoever runs less."""

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.merging.activity import Activity, kv_heads_of, recording
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, evaluating, hidden_states, token_loss
from lcprune.merging.streams import Stream
from tests.builders import token_batches
from tests.merging.planning import layers_of


def masked() -> list[Batch]:
    """Sequences padded on the right, on the left, and not at all."""
    masks = torch.ones(3, 2, 16, dtype=torch.long)
    masks[0, 0, 9:] = 0
    masks[1, 1, :5] = 0
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(token_batches(), masks, strict=True)]


def seen(model: PreTrainedModel, batches: Sequence[Batch], wanted: Sequence[int]) -> tuple[Activity, ...]:
    """The activity, from whole forward passes of transformers."""
    layout, layers = layout_of(model.config), layers_of(model)
    with evaluating(model), recording([layers[i] for i in wanted], layout, kv_heads_of(model.config)) as recorder:
        for batch in batches:
            recorder.mask_BT = batch.get("attention_mask")
            hidden_states(model, batch)
    return recorder.activities()


def measuring(model: PreTrainedModel, batches: Sequence[Batch]) -> Callable[[Sequence[int]], tuple[Activity, ...]]:
    return lambda wanted: seen(model, batches, wanted)


def assert_close(left: Iterable[Activity], right: Iterable[Activity]) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one.heads_KI, other.heads_KI, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.channels_F, other.channels_F, rtol=1e-4, atol=1e-6)


def loss_of(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    with evaluating(model):
        losses = [token_loss(model, hidden_states(model, batch), batch) for batch in batches]
    return sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every layer that a batch runs through, as layers are numbered then."""
    run: list[int] = []
    original = Stream.run

    def counting(self: Stream, layer: nn.Module, index: int, state: Tensor | None = None) -> Tensor:
        run.append(list(layers_of(self.model)).index(layer))
        return original(self, layer, index, state)

    monkeypatch.setattr(Stream, "run", counting)
    return run
