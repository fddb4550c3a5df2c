"""Teacher and student as they are loaded: one model seen twice, as far as both hold their weights alike.

student        teacher
float32        float32      one set of tensors for both
nf4            nf4          one set of packed tensors for both
bfloat16       int8         two models; embeddings, norms and head are shared where their types agree
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lcprune.distillation import quantized
from lcprune.distillation.adapters import Lora
from lcprune.distillation.quantized import Packed
from lcprune.distillation.teacher import DtypeName, TeacherDtype, cast, load
from lcprune.merging import surgery

TRUE: dict[str, DtypeName] = {"bf16-true": "bfloat16", "16-true": "float16"}
"""What Lightning casts the student to, by the trainer's precision."""


@dataclass(frozen=True)
class Storage:
    """What a model's weights are held in."""

    dtype: DtypeName
    """Type of everything that is not packed, and of the products."""
    packed: Packed | None = None
    """What the projections of its layers are packed into."""


def storages(
    dtype: DtypeName, teacher_dtype: TeacherDtype, lora: Lora | None, precision: str
) -> tuple[Storage, Storage]:
    """How a run's student and its teacher are held.

    Args:
        dtype: As model.dtype.
        teacher_dtype: As model.teacher_dtype.
        lora: The student's adapters.
        precision: The trainer's; empty without one.
    """
    student = Storage(dtype, None if lora is None or lora.base == "full" else lora.base)
    usual: DtypeName = "bfloat16" if precision.startswith("bf16") else dtype
    if teacher_dtype == "int8" or teacher_dtype == "nf4":
        return student, Storage(usual, teacher_dtype)
    return student, Storage(usual if teacher_dtype == "auto" else teacher_dtype)


def load_pair(
    name: str, student: Storage, teacher: Storage, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The original twice: as the teacher and as the student that nothing has happened to yet.

    Args:
        name: Hub name or folder.
        student: How the student's weights are held.
        teacher: How the teacher's are.
        device: Where to.
    """
    model = load(name, student.dtype, device, student.packed)
    if student.packed != teacher.packed:
        original = load(name, teacher.dtype, device, teacher.packed)
        _share(model, original)
        return original, model
    view = surgery.second_view(model) if student.packed is None else quantized.second_view(model)
    if teacher.dtype != student.dtype:
        # New storage for every parameter of the teacher that is not packed: those are no longer shared.
        cast(model, getattr(torch, teacher.dtype))
    return model, view


def _share(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Lets go of the student's copies of what the teacher holds in the same type."""
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if parameter.is_floating_point() and parameter.dtype == theirs[name].dtype:
            parameter.data = theirs[name].data
