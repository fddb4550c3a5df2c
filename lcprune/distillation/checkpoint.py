"""What lcprune adds to a Lightning checkpoint, and how a student comes out of one without a trainer.

    checkpoint["lcprune"] = {history, fingerprint of the teacher, dtype of the weights, random state of every rank,
                             where the run stands, the optimizer's class and what it holds}

Plain data only, because checkpoints are read with `weights_only=True`. The teacher's weights are never in there.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lcprune import models
from lcprune.distillation import adapters, quantized
from lcprune.distillation.adapters import Lora
from lcprune.distillation.fingerprint import Fingerprint, differences, fingerprint_of
from lcprune.distillation.randomness import RngState
from lcprune.distillation.storing import META, check_whole
from lcprune.distillation.teacher import DtypeName, load
from lcprune.distillation.trained import Scope
from lcprune.errors import InputError, reason
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.surgery import mend_config

KEY = "lcprune"
"""Where in a checkpoint the record is."""
PREFIX = "student."
"""What the tensors of DistillationModule's student are called in a state dict, before their own names."""
HELD: dict[Scope, str] = {
    "all": "all parameters (train: all)",
    "layers": "those of layers alone (train: layers, merged or after_merge)",
    "adapters": "adapters (train: lora, lora_merged or lora_after_merge)",
}
"""What an optimizer holds, as a user asks for it."""


@dataclass(frozen=True)
class Record:
    """What a checkpoint says about the student in it."""

    history: MergeHistory
    """How the student came from the teacher."""
    fingerprint: Fingerprint
    """The teacher's, by `fingerprint_of`."""
    dtype: DtypeName
    """Type of the student's weights."""
    rng: tuple[RngState, ...]
    """Random state of every rank, in order."""
    lora: dict[str, object] | None = None
    """The adapters that are in it, as `Lora.record`; None = there are none."""
    packed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Packed weights that the teacher's folder does not have, by module."""
    standing: Mapping[str, object] = field(default_factory=dict)
    """Where the run stood, as `Standing.to_dict`; empty = in a checkpoint from before it was kept."""
    prefix: str = PREFIX
    """What the student's tensors are called in the state dict, before their own names."""
    optimizer: str = ""
    """Class of the optimizer; empty = not known."""
    scope: Scope | None = None
    """Where the optimizer's Parameters are; None = not known."""

    def to_dict(self) -> dict[str, object]:
        """Plain data for a checkpoint."""
        return {
            "history": self.history.to_dict(),
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "rng": list(self.rng),
            "lora": self.lora,
            "packed": self.packed,
            "standing": dict(self.standing),
            "prefix": self.prefix,
            "optimizer": self.optimizer,
            "scope": self.scope,
        }

    @classmethod
    def of(cls, checkpoint: Mapping[str, object]) -> "Record":
        """The record in a loaded checkpoint; raises InputError if lcprune did not write it."""
        record = checkpoint.get(KEY)
        if not isinstance(record, Mapping) or not {"history", "fingerprint", "dtype", "rng"} <= set(record):
            raise InputError("ckpt_path names a checkpoint that lcprune did not write: name one from a run's folder.")
        history = MergeHistory.from_dict(record["history"])
        plain = cls(history, dict(record["fingerprint"]), record["dtype"], tuple(record["rng"]))
        return replace(
            plain,
            lora=record.get("lora"),
            packed=record.get("packed", {}),
            standing=record.get("standing", {}),
            prefix=record.get("prefix", PREFIX),
            optimizer=record.get("optimizer", ""),
            scope=record.get("scope"),
        )

    def check_fits(self, teacher: str, fingerprint: Fingerprint) -> None:
        """Raises InputError if the checkpoint was trained from another model than `teacher`."""
        if found := differences(self.fingerprint, fingerprint):
            was, now = found
            raise InputError(
                f"ckpt_path names a checkpoint of another model ({self.history.teacher}: {was}) than "
                f"model.teacher={teacher!r} ({now}): name the model it was trained from."
            )

    def check_begun(self, begun: MergeHistory) -> None:
        """Raises InputError if the run that goes on begins with another student than the one that wrote this."""
        before = sum(step.global_step is None for step in self.history.steps)
        if before != len(begun.steps):
            raise InputError(
                f"ckpt_path names a checkpoint of a run that began with {before} merges done, model.student says "
                f"{len(begun.steps)}: resume with the model.student that the run began with, or without one if it had "
                "none."
            )

    def check_adapters(self, lora: Mapping[str, object] | None) -> None:
        """Raises InputError if the run that goes on has other adapters than the one that wrote the checkpoint."""
        if self.lora == lora:
            return
        was, now = ("none" if each is None else str(dict(each)) for each in (self.lora, lora))
        raise InputError(
            f"ckpt_path names a checkpoint whose adapters are {was}, model.lora and model.train ask for {now}: "
            "go on as it was begun, or export its student (lcprune export) and train from there."
        )

    def check_optimizer(self, optimizer: str, scope: Scope) -> None:
        """Raises InputError if the optimizer of the run that goes on could not take over this one's state.

        Args:
            optimizer: Its class.
            scope: Where its Parameters are.
        """
        if self.optimizer not in ("", optimizer):
            wrong = f"whose optimizer is {self.optimizer}, model.optimizer is {optimizer}"
        elif self.scope not in (None, scope):
            wrong = f"whose optimizer holds {HELD[self.scope]}, model.train and model.phases ask for {HELD[scope]}"
        else:
            return
        raise InputError(
            f"ckpt_path names a checkpoint {wrong}: go on as it was begun, or export its student (lcprune export) and "
            "begin a run with it (model.student)."
        )


def read(path: Path) -> Record:
    """The record of a checkpoint file, which is looked over but whose weights are not read.

    Raises:
        InputError: If the file is missing, not whole, or not ours.
    """
    return Record.of(load_file(path / META if path.is_dir() else path))


def goes_on(path: Path) -> bool:
    """Whether a run can go on from a checkpoint: one of weights alone lacks the optimizer's state."""
    # A checkpoint in shards keeps the optimizer's state in files of its own, the schedules' beside our record.
    return "lr_schedulers" in load_file(path / META) if path.is_dir() else "optimizer_states" in load_file(path)


def check_goes_on(path: Path) -> None:
    """Raises InputError for a checkpoint of weights alone."""
    if not goes_on(path):
        raise InputError(
            f"{path} holds weights without the optimizer's state (save_weights_only), so no run can go on from it: "
            "name another checkpoint, or export its student (lcprune export) and begin with it (model.student)."
        )


def load_student(path: Path, teacher: str | None = None) -> tuple[PreTrainedModel, Record]:
    """The student out of a checkpoint, plain and on the CPU: adapters are part of its weights, nothing is packed.

    The teacher's config is needed, and its weights only where the student's base was packed.

    Args:
        path: The checkpoint.
        teacher: Where its teacher is now; default: where it was.

    Raises:
        InputError: As `read`, or if the teacher's config cannot be found any more or does not fit.
    """
    checkpoint = load_file(path)
    record = Record.of(checkpoint)
    teacher = record.history.teacher if teacher is None else teacher
    config = models.read_config(teacher)
    record.check_fits(teacher, fingerprint_of(config))
    mend_config(config, record.history.steps)
    weights = checkpoint["state_dict"]
    assert isinstance(weights, Mapping)
    tensors = {
        name.removeprefix(record.prefix): tensor for name, tensor in weights.items() if name.startswith(record.prefix)
    }
    dtype = next(iter(tensors.values())).dtype  # bf16-true trains in another one than model.dtype
    lora = None if record.lora is None else Lora(**record.lora)  # type: ignore[arg-type]
    if lora is not None and lora.base != "full":
        model = load(teacher, record.dtype, packed=lora.base)
        surgery.replay(model, record.history)
    else:
        # From a config alone: transformers has no folder to read, and takes weights and dtype from what it is given.
        config.dtype = dtype
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if lora is not None:
        adapters.attach(model, lora)
    quantized.restore(model, record.packed)
    model.load_state_dict({**quantized.packed_weights(model), **tensors}, assign=True)
    model.tie_weights()
    adapters.fold(model)
    if (generation := models.read_generation_config(teacher)) is not None:
        model.generation_config = generation
    return model.eval(), record


def load_file(path: Path) -> dict[str, object]:
    """A checkpoint as it lies in its file; raises InputError if it is missing or not whole."""
    if path.is_dir():
        raise InputError(
            f"ckpt_path={path} is a folder, a checkpoint in shards from which only the strategy that wrote it goes on: "
            "name one that is a single file (save_distributed_checkpoint: false, or FSDPStrategy's state_dict_type: "
            "full, writes such)."
        )
    if not path.is_file():
        raise InputError(f"ckpt_path={path} does not exist or is not a file: checkpoints are in RUN/checkpoints/.")
    check_whole(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"ckpt_path={path} cannot be read, it is not a whole checkpoint ({reason(error)[:120]}): name another one."
        ) from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"ckpt_path={path} is not a Lightning checkpoint: name one from a run's folder.")
    return checkpoint
