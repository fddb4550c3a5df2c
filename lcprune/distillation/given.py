"""A DistillationModule around models that are in memory already, for use from Python.

student   trained in place; its weights are its own, whatever the teacher's memory is
teacher   a view of the given model, so that neither its settings nor its place change; or a name
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PretrainedConfig, PreTrainedModel

from lcprune.distillation.levels import Level
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.pair import storages
from lcprune.distillation.strategies import is_sharding
from lcprune.distillation.teacher import cast, load
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.lineage import MergeHistory


class GivenModels(DistillationModule):
    """Trains a model that is in memory, taught by one that is, too, or by one that is named.

    Args:
        student: A causal LM of the teacher's family.
        teacher: The original, or its name or folder.
        history: How the student came from it; None = it has the teacher's depth.
        objective: As in DistillationModule.
        optimizer: As in DistillationModule.
        lr_scheduler: As in DistillationModule.

    Raises:
        InputError: If the student's depth is not the history's, or the two are not of one kind.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | str | Path,
        *,
        history: MergeHistory | None = None,
        objective: list[Level] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        name = teacher.config.name_or_path or "the given teacher" if isinstance(teacher, PreTrainedModel) else teacher
        super().__init__(teacher=name, objective=objective, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.given_student, self.given_history = (student,), history  # in a tuple: no submodule before its time
        self.given_teacher = (teacher,) if isinstance(teacher, PreTrainedModel) else ()
        self._check()

    @property
    def teacher_config(self) -> PretrainedConfig:
        """The original's config."""
        return self.given_teacher[0].config if self.given_teacher else super().teacher_config

    @cached_property
    def begun(self) -> MergeHistory:
        """How the student came from the teacher before this run."""
        depth = layout_of(self.teacher_config).depth_of(self.teacher_config)
        history = self.given_history if self.given_history is not None else MergeHistory(depth)
        steps = tuple(replace(step, global_step=None) for step in history.steps)
        return replace(history, steps=steps, teacher=self.teacher_name)

    def check_source(self) -> None:
        """A teacher in memory is not read again, nor is its folder, which may be gone."""
        if not self.given_teacher:
            super().check_source()

    def check_sharding(self, trainer: Trainer) -> None:
        """Raises InputError for a strategy that shards the models, which would be loaded by name again in the end."""
        if is_sharding(trainer.strategy):
            raise InputError(
                "trainer.strategy=ModelParallelStrategy does not work with models that are in memory: name both in a "
                "DistillationModule, or use one device or ddp."
            )

    def load_models(self, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The teacher, and the given student on the device."""
        theirs = storages(self.weights_dtype, self.teacher_dtype, None, self._precision)[1]
        self._prefix_is_original = False
        student = self.given_student[0].to(device)  # type: ignore[arg-type]
        if not self.given_teacher:
            return load(self.teacher_name, theirs.dtype, device), student
        teacher = surgery.second_view(self.given_teacher[0])
        cast(teacher, getattr(torch, theirs.dtype))
        return teacher.to(device), student  # type: ignore[arg-type]

    def _check(self) -> None:
        ours, theirs = self.given_student[0].config, self.teacher_config
        layout = layout_of(theirs)
        differing = [
            f"{field} {getattr(ours, field, None)} and {getattr(theirs, field, None)}"
            for field in ("model_type", "hidden_size", "vocab_size")
            if getattr(ours, field, None) != getattr(theirs, field, None)
        ]
        if differing:
            raise InputError(
                f"student and teacher={self.teacher_name!r} are not of one kind ({'; '.join(differing)}): name the "
                "model that the student was shortened from."
            )
        depth, wanted = len(layout.layers_of(self.given_student[0])), self.begun.depth
        if self.begun.teacher_depth != layout.depth_of(theirs):
            raise InputError(
                f"history starts from {self.begun.teacher_depth} layers, teacher={self.teacher_name!r} has "
                f"{layout.depth_of(theirs)}: name the model that the student was shortened from."
            )
        if depth != wanted:
            raise InputError(
                f"The student has {depth} layers, {wanted} by its history: give history=, as lcprune.collapse returned "
                "it or lcprune.load_history reads it."
            )
