"""What a run amounts to in numbers: the rows of the closing table, and figures.json.

Speeds are of the forward pass with logits (prefill), teacher and student in turn in the same process and dtype.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lcprune import weights
from lcprune.delivery import speed
from lcprune.merging.architectures import layout_of
from lcprune.merging.lineage import MergeHistory


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
    """`teacher` and `student`: tokens per second of a forward pass with logits; empty = not measured."""
    history: MergeHistory
    """With what was measured right after every merge."""
    final: Mapping[str, float]
    """Validation figures at the end: `val/perplexity`, `val/teacher_perplexity`, `val/agreement`."""

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {**asdict(self), "history": self.history.to_dict()}


def model_figures(model: PreTrainedModel, folder: Path) -> ModelFigures:
    """Counts a model, what is packed in 4 bit too; without weights in `folder` its size on disk is its tensors'."""
    stored = weights.size_of(folder) or sum(one.numel() * one.element_size() for one in model.parameters())
    return ModelFigures(layout_of(model.config).depth_of(model.config), model.num_parameters(), stored)


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
    return speed.prefill({"teacher": teacher, "student": student}, batch["input_ids"])
