"""What a checkpoint holds of a student, and how a run goes on from one.

    on_save_checkpoint    weights (Lightning's) + Record: history, standing, random states of all ranks, what is packed
    on_load_checkpoint    the history is replayed on the freshly loaded student, then Lightning loads the weights

A sharded student cannot be replayed on: it gets its depth before it is cut into shards.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel
from typing_extensions import Self

from lcprune import models
from lcprune.distillation import averaging, beforehand, beginning, optim, quantized, sharded
from lcprune.distillation import teacher as teacher_room
from lcprune.distillation import trained as trained_room
from lcprune.distillation.adapters import Lora
from lcprune.distillation.boundary import StepBoundary
from lcprune.distillation.checkpoint import KEY, PREFIX, Record, read
from lcprune.distillation.evaluated import Evaluated
from lcprune.distillation.faults import check_weights
from lcprune.distillation.fingerprint import Fingerprint
from lcprune.distillation.pair import load_pair, storages
from lcprune.distillation.phases import Phase
from lcprune.distillation.randomness import RngState, restore_rng_state, states_of_ranks
from lcprune.distillation.standing import Standing
from lcprune.distillation.teacher import DtypeName, Teacher, TeacherDtype
from lcprune.distillation.trained import Scope, Trained
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeHistory


class Resumable(Evaluated):
    """A student with a history, and the way of both into a checkpoint and out of it."""

    teacher_name: str
    """Hub name or folder of the original."""
    student_folder: Path | None
    """Of a student that was shortened before."""
    weights_dtype: DtypeName
    """Type of the student's weights."""
    teacher_dtype: TeacherDtype
    """Type of the teacher's."""
    lora: Lora | None
    """The student's adapters."""
    history: MergeHistory
    """How the student came from the teacher."""
    phases: tuple[Phase, ...]
    """Of the run."""
    train_usually: Trained
    """What is trained where a phase does not say."""
    make_optimizer: OptimizerCallable
    """From the trained Parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.standing = Standing()
        """Tokens read, validations since the last merge, merges undone; `ProgressiveCollapse` keeps it."""
        self.boundary = StepBoundary()
        """Where the run stands between two optimizer steps."""
        self.resume_from: Path | None = None
        """Checkpoint that a sharded run goes on from, where `trainer.ckpt_path` does not say so before `fit`."""
        self._rng: RngState | None = None  # with which a resumed run goes on
        self._asked: list[dict[str, object]] = []  # settings of the optimizer as it was made, see `optim.settings`
        self._prefix_is_original = True  # whether layers before the first merged one are the teacher's, value by value

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's; the teacher is the one that the checkpoint names, unless another is given."""
        if isinstance(checkpoint_path, str | Path):
            kwargs.setdefault("teacher", read(Path(checkpoint_path)).history.teacher)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    @property
    def begun(self) -> MergeHistory:
        """How the student came from the teacher before this run."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> Fingerprint:
        """What a checkpoint must have in common with this module's teacher."""
        raise NotImplementedError

    def choose_trained(self) -> None:
        """Makes trainable what is to be trained now."""
        raise NotImplementedError

    @property
    def resumes(self) -> bool:
        """Whether a checkpoint has been loaded and training has not gone on from it yet."""
        return self._rng is not None

    def go_on(self) -> None:
        """Goes on with an interrupted run: its random numbers, and what the recipe now says of the optimizer."""
        if self._rng is None:
            return
        restore_rng_state(self._rng)
        self._rng = None
        if self._asked:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            optim.take_over(self.trainer.optimizers[0], self._asked, schedulers[0] if schedulers else None)

    def begin_anew(self) -> None:
        """Makes merges that another `fit` of the same module has made those of before this one."""
        self.history = vars(self)["begun"] = self.history.of_before()
        self.choose_trained()

    def _resume_depth(self, student: PreTrainedModel) -> None:
        """Gives a student that is about to be sharded the depth of the checkpoint, which is loaded only then."""
        path = self.resume_from or self.trainer.ckpt_path
        if path is None:
            return
        record = read(Path(path))
        self._check_resumes(record)
        rest = record.history.after(self.history)
        assert rest is not None
        surgery.replay(student, rest)
        self.history = record.history

    def _check_resumes(self, record: Record) -> None:
        record.check_fits(self.teacher_name, self.fingerprint)
        record.check_adapters(None if self.lora is None else self.lora.record)
        record.check_begun(self.begun)

    def check_goes_on(self, record: Record) -> None:
        """Raises InputError if the optimizer could not take over what that of a checkpoint's run knows."""
        record.check_optimizer(self._optimizer_name, self._scope)

    @property
    def _optimizer_name(self) -> str:
        return type(beforehand.try_out(self.make_optimizer, None)).__name__

    @property
    def _scope(self) -> Scope:
        return trained_room.scope([phase.trained(self.train_usually) for phase in self.phases])

    def gather(self, dtype: torch.dtype) -> None:
        """Puts plain models in the place of sharded ones, on rank 0's CPU, the student in `dtype`; for all ranks."""
        state = sharded.full_state(self.student)
        if self.global_rank:
            return
        mine, theirs = storages(self.weights_dtype, self.teacher_dtype, self.lora, self._precision)
        model, student = load_pair(self.teacher_name, mine, theirs, torch.device("cpu"))
        surgery.replay(student, self.history)
        student.load_state_dict(state, assign=True)
        student.tie_weights()
        teacher_room.cast(student, dtype)
        self.teacher, self.student = Teacher(model), student

    def load_models(self, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The original, and the student as it begins."""
        mine, theirs = storages(self.weights_dtype, self.teacher_dtype, self.lora, self._precision)
        model, student = load_pair(self.teacher_name, mine, theirs, device)
        self._prefix_is_original = mine.packed == theirs.packed
        if self.student_folder is not None:
            same = beginning.take_over(student, self.student_folder, self.begun, self.weights_dtype)
            self._prefix_is_original &= same
        return model, student

    @property
    def _precision(self) -> str:
        return "" if self._trainer is None else str(self._trainer.precision)

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Adds history, the teacher's fingerprint and every rank's random state, as plain data."""
        step = self.trainer.global_step
        self.boundary.rewind(checkpoint, step)
        check_weights(self.student.named_parameters(), self.trainer)
        states = states_of_ranks(self.boundary.random_state(step))
        standing = self.boundary.standing(self.standing.to_dict(), step)
        record = Record(
            self.history,
            self.fingerprint,
            self.weights_dtype,
            states,
            standing=standing,
            optimizer=self._optimizer_name,
            scope=self._scope,
        )
        if self.lora is not None:
            # What is still packed as it was loaded is loaded again.
            weights = checkpoint["state_dict"]
            assert isinstance(weights, dict)
            for name in quantized.keys_of(self, weights):
                del weights[name]
            record = replace(record, lora=self.lora.record, packed=quantized.own_weights(self.student))
        checkpoint[KEY] = record.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Replays the history on the freshly loaded student, so that the checkpoint's weights fit it."""
        record = Record.of(checkpoint)
        self._check_resumes(record)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self.check_goes_on(record)
        if models.located(record.history.teacher) != self.teacher_name:
            rank_zero_warn(
                f"the checkpoint's teacher is {record.history.teacher!r}, model.teacher is {self.teacher_name!r}: "
                "they have the same shape, make sure that they are the same model"
            )
        rest = record.history.after(self.history)
        if rest is None:
            raise InputError(
                "This module's student was merged otherwise than the checkpoint's: load it into a new module, with the "
                "model.student that the checkpoint's run began with."
            )
        surgery.replay(self.student, rest)
        self.history = record.history
        self._rng = record.rng[self.global_rank if self.global_rank < len(record.rng) else 0]
        self.standing = Standing.of(record.standing)
        if sharded.is_sharded(self.student):
            return  # weights and optimizer have been loaded by the strategy
        averaging.replay(self, rest)
        quantized.restore(self.student, record.packed)
        weights = checkpoint["state_dict"]
        assert isinstance(weights, dict)
        weights.update({PREFIX + name: weight for name, weight in quantized.packed_weights(self.student).items()})
        self.choose_trained()
        stored = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
        self._prefix_is_original &= trained_room.make_room(self.student, stored, record.history.lineage)
