"""Which of a student's Parameters are trained, and what becomes of the others.

    all            everything
    layers         every decoder layer; embeddings, final norm and head stay the teacher's
    merged         only layers that descend from several of the teacher's
    after_merge    every layer from the first merged one on

What is trained has storage of its own, in the type that weights are trained in. What is not is the teacher's own
tensor: it takes no memory, and the layers before the first trained one need not be run a second time.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from lcprune.merging.architectures import layout_of
from lcprune.merging.lineage import Lineage

Trained: TypeAlias = Literal["all", "layers", "merged", "after_merge"]
"""Names of what can be trained."""
TRAINED: tuple[Trained, ...] = get_args(Trained)


def trained_layers(what: Trained, lineage: Lineage) -> tuple[int, ...]:
    """The student layers that are trained, in order.

    Example:
        >>> trained_layers("after_merge", ((0,), (1, 2), (3,)))
        (1, 2)
    """
    merged = [place for place, ancestors in enumerate(lineage) if len(ancestors) > 1]
    if what == "merged":
        return tuple(merged)
    if what == "after_merge":
        return tuple(range(min(merged, default=len(lineage)), len(lineage)))
    return tuple(range(len(lineage)))


def trained_parameters(student: PreTrainedModel, what: Trained, lineage: Lineage) -> list[nn.Parameter]:
    """Every Parameter that is trained, each once, in the model's order."""
    layers = layout_of(student.config).layers_of(student)
    modules: Iterable[nn.Module] = [student] if what == "all" else [layers[s] for s in trained_layers(what, lineage)]
    return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))


def ever_trained(student: PreTrainedModel, whats: Sequence[Trained]) -> list[nn.Parameter]:
    """Every Parameter that one of the settings may train at some time: what an optimizer has to know from the start."""
    if "all" in whats:
        return list(student.parameters())
    return list(layout_of(student.config).layers_of(student).parameters())


def train(
    student: PreTrainedModel, teacher: PreTrainedModel, chosen: Sequence[nn.Parameter], dtype: torch.dtype
) -> None:
    """Makes exactly the chosen Parameters trainable, in place; those that stop being trained keep their values.

    Args:
        student: Whose Parameters.
        teacher: Whose tensors must not be written to.
        chosen: Parameters of the student.
        dtype: The type in which weights are trained.
    """
    teachers = {parameter.data_ptr() for parameter in teacher.parameters()}
    wanted = {id(parameter) for parameter in chosen}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
        if not parameter.requires_grad:
            parameter.grad = None
        elif parameter.dtype != dtype or parameter.data_ptr() in teachers:
            parameter.data = parameter.data.to(dtype, copy=True)
