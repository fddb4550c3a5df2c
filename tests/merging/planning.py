"""What tests of planners share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.criteria import Criterion
from lcprune.merging.lineage import MergeStep
from tests.builders import tiny_llama, token_batches


@dataclass(frozen=True)
class Given(Criterion):
    """Scores that a test has made up."""

    scores: tuple[float, ...]

    def score(self, calibration: Calibration) -> tuple[float, ...]:
        return self.scores


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
