"""Lightning's running averages of the weights (`WeightAveraging`, EMA among them) across a merge.

    average' = student' + operator(average - student)

The averaged student gets the same steps, of layers whose activity was the student's; operators are linear in the
weights. What a refit then adds to a weight is added to its average too. Averages that follow are as good a start as
the merged weights themselves, and forget how far they were apart at the pace of the user's decay.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lcprune.distillation.evaluated import Evaluated
from lcprune.distillation.trained import Trained
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.activity import Activity
from lcprune.merging.lineage import MergeHistory, MergeStep

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import WeightAveraging
    from torch.optim.swa_utils import AveragedModel

NAME = "WeightAveraging"
"""The callback's name: it came after lightning 2.5."""


def check(trainer: Trainer, trained: Sequence[Trained]) -> None:
    """Raises InputError where averages would be written into weights that are the teacher's.

    Args:
        trainer: With its callbacks.
        trained: What the phases of the run train.
    """
    others = sorted(set(trained) - {"all"})
    for callback in _callbacks(trainer):
        if others:
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__} writes into every weight of the student, and where "
                f"{', '.join(others)} is trained some are the teacher's own: set train: all in every phase, or remove "
                "it."
            )


def begin(trainer: Trainer) -> None:
    """Leaves buffers out of the averages: they are constants, and an average of equal numbers is not always theirs."""
    for average in _averages(trainer):
        average.use_buffers = False


def copies(trainer: Trainer) -> list[Evaluated]:
    """The averaged copies of the module that is trained."""
    modules = [average.module for average in _averages(trainer)]
    return [module for module in modules if isinstance(module, Evaluated)]


def replay(module: LightningModule, history: MergeHistory) -> None:
    """Gives the averaged students of a run that resumes the structure that their weights will have.

    Args:
        module: That is trained, with or without a trainer.
        history: What has merged since the student was loaded.
    """
    if module._trainer is not None:
        for copy in copies(module.trainer):
            surgery.replay(copy.student, history)


@torch.no_grad()
def follow(
    average: PreTrainedModel,
    steps: Sequence[MergeStep],
    activities: Sequence[Sequence[Activity]],
    added: Mapping[str, Tensor],
) -> None:
    """Merges an averaged student as the student was, in place.

    Args:
        average: The averaged student.
        steps: What merged.
        activities: Of every step's members, as far as its operator asked.
        added: What a refit added to weights after the merge, by name.
    """
    for step, activity in zip(steps, activities, strict=True):
        here = [_on(average.device, layer) for layer in activity]
        surgery.apply(average, step, lambda wanted, here=here: here)  # type: ignore[misc]
    for name, change in added.items():
        weight = average.get_parameter(name)
        weight.data = weight.data + change.to(weight)


def added(before: Mapping[str, Tensor], student: PreTrainedModel) -> dict[str, Tensor]:
    """What was added to weights since they were `before`; only of those that have new storage."""
    now = {name: parameter.data for name, parameter in student.named_parameters()}
    changed = [name for name, weight in now.items() if weight.data_ptr() != before[name].data_ptr()]
    return {name: now[name] - before[name] for name in changed}


@contextmanager
def shown(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The student with its averaged weights, as Lightning validates it, for the length of the block."""
    callbacks = [callback for callback in _callbacks(trainer) if callback._average_model is not None]
    for callback in callbacks:
        callback._swap_models(module)
    try:
        yield
    finally:
        for callback in reversed(callbacks):
            callback._swap_models(module)


def _on(device: torch.device, activity: Activity) -> Activity:
    return Activity(*(tensor.to(device) for tensor in vars(activity).values()))


def _callbacks(trainer: Trainer) -> list["WeightAveraging"]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if NAME in {base.__name__ for base in type(callback).__mro__}]


def _averages(trainer: Trainer) -> list["AveragedModel"]:
    averages = (callback._average_model for callback in _callbacks(trainer))
    return [average for average in averages if average is not None]
