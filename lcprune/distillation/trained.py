"""Which of a student's Parameters are trained, and what becomes of the others.

    all            everything
    layers         every decoder layer; embeddings, final norm and head stay the teacher's
    merged         only layers that descend from several of the teacher's
    after_merge    every layer from the first merged one on
    lora           adapters on every decoder layer, and nothing else; lora_merged and lora_after_merge likewise;
                   an adapter on the output layer, where there is one, in all three

What is trained has storage of its own, in the type that weights are trained in. What is not is the teacher's own
tensor: it takes no memory, and the layers before the first trained one need not be run a second time.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.merging.architectures import layout_of
from lcprune.merging.lineage import Lineage

Trained: TypeAlias = Literal["all", "layers", "merged", "after_merge", "lora", "lora_merged", "lora_after_merge"]
"""Names of what can be trained."""
Scope: TypeAlias = Literal["all", "layers", "adapters"]
"""Where an optimizer's Parameters are: in the whole student, in its layers, or in adapters."""
TRAINED: tuple[Trained, ...] = get_args(Trained)
BESIDE_PREFIX: tuple[Trained, ...] = ("merged", "after_merge", "lora_merged", "lora_after_merge")
"""Those that leave the layers before the first merged one as they are."""


def trains_adapters(what: Trained) -> bool:
    """Whether adapters are trained instead of the weights themselves."""
    return what.startswith("lora")


def is_adapter(name: str) -> bool:
    """Whether a parameter's name, as peft gives it, is that of an adapter's factor."""
    return ".lora_" in name and ".default." in name


def trained_layers(what: Trained, lineage: Lineage) -> tuple[int, ...]:
    """The student layers that are trained, in order.

    Example:
        >>> trained_layers("after_merge", ((0,), (1, 2), (3,)))
        (1, 2)
    """
    merged = [place for place, ancestors in enumerate(lineage) if len(ancestors) > 1]
    if what in ("merged", "lora_merged"):
        return tuple(merged)
    if what in ("after_merge", "lora_after_merge"):
        return tuple(range(min(merged, default=len(lineage)), len(lineage)))
    return tuple(range(len(lineage)))


def trained_parameters(student: PreTrainedModel, what: Trained, lineage: Lineage) -> list[nn.Parameter]:
    """Every Parameter that is trained, each once, in the model's order."""
    layers = layout_of(student.config).layers_of(student)
    modules: Iterable[nn.Module] = [student] if what == "all" else [layers[s] for s in trained_layers(what, lineage)]
    named = (pair for module in modules for pair in module.named_parameters())
    chosen = [parameter for name, parameter in named if is_adapter(name) == trains_adapters(what)]
    return list(dict.fromkeys(chosen + (_head_adapter(student) if trains_adapters(what) else [])))


def ever_trained(student: PreTrainedModel, whats: Sequence[Trained]) -> list[nn.Parameter]:
    """Every Parameter that one of the settings may train at some time: what an optimizer has to know from the start."""
    layers = layout_of(student.config).layers_of(student)
    kinds = {trains_adapters(what) for what in whats}
    named = (student if "all" in whats else layers).named_parameters()
    chosen = [parameter for name, parameter in named if is_adapter(name) in kinds]
    return list(dict.fromkeys(chosen + (_head_adapter(student) if True in kinds else [])))


def scope(whats: Sequence[Trained]) -> Scope:
    """What `ever_trained` looks through for these settings; with other Parameters an optimizer's state does not fit."""
    if "all" in whats:
        return "all"
    return "adapters" if all(trains_adapters(what) for what in whats) else "layers"


def _head_adapter(student: PreTrainedModel) -> list[nn.Parameter]:
    """Both factors of the output layer's adapter, if it has one: it learns whichever layers do."""
    head = student.get_output_embeddings()
    return [parameter for name, parameter in head.named_parameters() if is_adapter(f".{name}")]


def own(parameter: nn.Parameter) -> None:
    """Gives a parameter storage of its own, keeping its identity."""
    parameter.data = parameter.data.clone()


def ids_behind(student: PreTrainedModel, lineage: Lineage) -> set[int]:
    """Identities of all Parameters of the first merged layer and of those behind it."""
    layers = layout_of(student.config).layers_of(student)
    return {id(parameter) for s in trained_layers("after_merge", lineage) for parameter in layers[s].parameters()}


def make_room(student: PreTrainedModel, stored: Mapping[str, Tensor], lineage: Lineage) -> bool:
    """Gives storage of their own to frozen Parameters that other values are about to be loaded into, in place.

    Args:
        student: Some of whose Parameters may be the teacher's memory.
        stored: What is about to be loaded, by name.
        lineage: Teacher layers of every student layer.

    Returns:
        Whether everything before the first merged layer stays as it is.
    """
    behind = ids_behind(student, lineage)
    untouched = True
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad and not parameter.equal(stored[name].to(parameter)):
            own(parameter)
            # An adapter that has not been trained has another A, drawn at random, and the same B = 0.
            untouched &= id(parameter) in behind or ".lora_A." in name
    return untouched


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
    mark(student, chosen)
    for parameter in chosen:
        if parameter.dtype != dtype or parameter.data_ptr() in teachers:
            parameter.data = parameter.data.to(dtype, copy=True)


def mark(student: nn.Module, chosen: Sequence[nn.Parameter]) -> None:
    """Makes exactly the chosen Parameters trainable, whose storage is their own already."""
    wanted = {id(parameter) for parameter in chosen}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
        if not parameter.requires_grad:
            parameter.grad = None
