"""What tests of planners share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.criteria import Criterion
from lcprune.merging.lineage import MergeStep
from lcprune.merging.operators import LayerTensors, WeightedAverage
from tests.builders import tiny_llama, token_batches


@dataclass(frozen=True)
class Given(Criterion):
    """Scores that a test has made up."""

    scores: tuple[float, ...]

    def score(self, calibration: Calibration) -> tuple[float, ...]:
        return self.scores


FRAGILE = 2.0**-9
"""In the first weight of a layer's MLP: `Breaking` makes nothing of the layer."""


@dataclass(frozen=True)
class Breaking(WeightedAverage):
    """As WeightedAverage, but what a fragile layer has part in is no number."""

    def merge(self, members: Sequence[LayerTensors], *others: Any) -> dict[str, Tensor]:
        merged = super().merge(members, *others)
        fragile = any(member["mlp.down_proj.weight"][0, 0] == FRAGILE for member in members)
        return {name: torch.full_like(tensor, nan) for name, tensor in merged.items()} if fragile else merged


def make_fragile(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.get_submodule("mlp.down_proj").weight[0, 0] = FRAGILE


def overflowing() -> PreTrainedModel:
    """In float16, which layer 2 leaves; its weights do not."""
    model = tiny_llama(dtype=torch.float16)
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.down_proj").weight.mul_(3e4)
    return model


def layers_of(model: PreTrainedModel) -> Any:
    return layout_of(model.config).layers_of(model)


def plain() -> list[Batch]:
    return [{"input_ids": ids} for ids in token_batches()]


def masked() -> list[Batch]:
    """Padding of another length in every row, on the right."""
    batches: list[Batch] = []
    for ids, lengths in zip(token_batches(), ((16, 9), (3, 12), (1, 16)), strict=True):
        mask = (torch.arange(16) < torch.tensor(lengths)[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def last_states(model: PreTrainedModel, batches: list[Batch]) -> list[Tensor]:
    """The state after the final norm, from transformers."""
    with torch.no_grad():
        return [model(**batch, output_hidden_states=True, use_cache=False).hidden_states[-1] for batch in batches]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left: nn.Module | dict[str, Tensor], right: nn.Module | dict[str, Tensor]) -> None:
    states = [dict(each.state_dict()) if isinstance(each, nn.Module) else each for each in (left, right)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def groups_of(steps: Iterable[MergeStep]) -> list[tuple[int, ...]]:
    return [step.group for step in steps]
