"""Lightning's running averages of the weights (`WeightAveraging`, EMA among them) across a merge.

    average' = operator(average) = student' + operator(average - student)          operators are linear in the weights

The averaged student gets the same steps, and what a refit then adds to a weight is added to its average too. An
operator that chooses by activity (`Concat`) would choose otherwise among other weights: what it merges starts its
average afresh at the student's weights. How far averages and student are apart, they forget at the user's decay.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from transformers import PreTrainedModel

from lcprune.distillation.evaluated import Evaluated
from lcprune.distillation.trained import Trained
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, spec_of

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import WeightAveraging
    from torch.optim.swa_utils import AveragedModel

NAME = "WeightAveraging"
"""The callback's name: it came after lightning 2.5."""
TOO_EARLY = "StochasticWeightAveraging"
"""Copies a module before `configure_model` gives it its student."""


def check(trainer: Trainer, trained: Sequence[Trained]) -> None:
    """Raises InputError where averages would be of pieces, or be written into weights that are the teacher's.

    Args:
        trainer: With its callbacks.
        trained: What the phases of the run train.
    """
    for callback in _callbacks(trainer, TOO_EARLY):
        raise InputError(
            f"trainer.callbacks: {type(callback).__name__} copies the module before its student is loaded, and would "
            "average nothing: remove it, or use WeightAveraging or EMAWeightAveraging."
        )
    others = sorted(set(trained) - {"all"})
    for callback in _callbacks(trainer):
        if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__} averages whole weights, and trainer.strategy="
                f"{type(trainer.strategy).__name__} has them in pieces: use a single device or ddp, or remove it."
            )
        if others:
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__} writes into every weight of the student, and where "
                f"{', '.join(others)} is trained some are the teacher's own: set train: all in every phase, or remove "
                "it."
            )


def refuse(trainer: Trainer, why: str) -> None:
    """Raises InputError where there are averages at all.

    Args:
        trainer: With its callbacks.
        why: They cannot follow a merge, as the middle of a sentence.
    """
    for callback in _callbacks(trainer):
        raise InputError(
            f"trainer.callbacks: {type(callback).__name__} follows the merges of an lcprune.DistillationModule, {why}: "
            "remove it."
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
    afresh: Sequence[Sequence[Tensor]],
    added: Mapping[str, Tensor],
) -> None:
    """Merges an averaged student as the student was, in place.

    Args:
        average: The averaged student.
        steps: What merged.
        afresh: For every step the weights of the student's merged layer, where its operator chose; else nothing.
        added: What a refit added to weights after the merge, by name.
    """
    for step, weights in zip(steps, afresh, strict=True):
        linear = replace(step, operator=spec_of(Drop())) if weights else step
        outcome = surgery.apply(average, linear)
        if weights:
            for parameter, weight in zip(outcome.merged, weights, strict=True):
                parameter.data = weight.to(parameter, copy=True)
    for name, change in added.items():
        parameter = average.get_parameter(name)
        parameter.data = parameter.data + change.to(parameter)


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


def finish(trainer: Trainer, module: LightningModule) -> None:
    """Gives the module its averaged weights, as the end of training does.

    Lightning skips that end, too, where a checkpoint has nothing left to train. A second time changes nothing.
    """
    for callback in _callbacks(trainer):
        if callback._average_model is not None:
            callback._copy_average_to_current(module)


def count(trainer: Trainer) -> int:
    """How many callbacks hold averages beside the weights, on the device that trains."""
    return sum(str(callback._device) != "cpu" for callback in _callbacks(trainer))


def _callbacks(trainer: Trainer, name: str = NAME) -> list["WeightAveraging"]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if name in {base.__name__ for base in type(callback).__mro__}]


def _averages(trainer: Trainer) -> list["AveragedModel"]:
    averages = (callback._average_model for callback in _callbacks(trainer))
    return [average for average in averages if average is not None]
