"""What a run amounts to in numbers: the rows of the closing table, and figures.json.

Speeds are of the forward pass with logits (prefill), teacher and student in turn in the same process and dtype, so
that their ratio holds on a machine whose speed drifts.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lcprune.delivery.export import folder_size
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import evaluating
from lcprune.merging.lineage import MergeHistory

REPEATS = 3
"""Timed passes of each model; the median counts."""


@dataclass(frozen=True)
class ModelFigures:
    """Size of a model."""

    layers: int
    """Decoder layers."""
    parameters: int
    """Parameters; tied ones count once."""
    bytes: int
    """Size of its weights on disk."""


@dataclass(frozen=True)
class Figures:
    """A finished run."""

    teacher: ModelFigures
    """The original."""
    student: ModelFigures
    """The exported student."""
    speed: Mapping[str, float]
    """`teacher` and `student`: tokens per second of a forward pass with logits."""
    history: MergeHistory
    """With what was measured right after every merge."""
    final: Mapping[str, float]
    """Validation figures at the end: `val/perplexity`, `val/teacher_perplexity`, `val/agreement`."""

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {**asdict(self), "history": self.history.to_dict()}


def model_figures(model: PreTrainedModel, folder: Path) -> ModelFigures:
    """Counts a model; without weights in `folder` its size on disk is that of its tensors."""
    parameters = list(model.parameters())
    stored = folder_size(folder) or sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return ModelFigures(layout_of(model.config).depth_of(model.config), sum(p.numel() for p in parameters), stored)


def throughput(teacher: PreTrainedModel, student_folder: Path, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Tokens per second of the teacher and of the exported student, in the teacher's dtype on its device.

    Args:
        teacher: The original model.
        student_folder: An export; loaded for the length of the call.
        batch: `input_ids` [B, T] to run.
    """
    student = AutoModelForCausalLM.from_pretrained(
        student_folder,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=teacher.dtype,
        device_map={"": teacher.device},
    )
    ids_BT = batch["input_ids"].to(teacher.device)
    seconds: dict[str, list[float]] = {"teacher": [], "student": []}
    for _ in range(REPEATS + 1):
        for name, model in (("teacher", teacher), ("student", student)):
            seconds[name].append(_seconds(model, ids_BT))
    # The first pass of each warms up.
    return {name: ids_BT.numel() / statistics.median(times[1:]) for name, times in seconds.items()}


def _seconds(model: PreTrainedModel, ids_BT: Tensor) -> float:
    with evaluating(model):
        _synchronize(ids_BT.device)
        start = time.perf_counter()
        model(input_ids=ids_BT, use_cache=False)
        _synchronize(ids_BT.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
