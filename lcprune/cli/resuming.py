"""`--ckpt_path last`: the newest checkpoint of the run's folder that is whole."""

import os
import sys
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lcprune.distillation.storing import SUFFIX, first_whole
from lcprune.errors import InputError


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest whole checkpoint of a run, whatever its name; None where there is none yet.

    The damaged ones that are newer are named on stderr.

    Raises:
        InputError: There are checkpoints and none of them is whole.
    """
    folders = checkpoint_folders(trainer)
    path, skipped = first_whole(path for folder in folders for path in folder.glob(f"*{SUFFIX}"))
    damaged = ", ".join(map(str, skipped))
    if path is not None:
        note = f" ({damaged} newer, but not whole)" if skipped else ""
        _say(f"--ckpt_path last: {path}{note}")
    elif skipped:
        raise InputError(f"ckpt_path=last: no checkpoint is whole ({damaged}): start a new run without ckpt_path.")
    else:
        _say(f"--ckpt_path last: no checkpoint yet in {', '.join(map(str, folders))}, a new run begins")
    return path


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Where the run's ModelCheckpoints write."""
    given = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return list(dict.fromkeys(_usual_folder(trainer) if folder is None else Path(folder) for folder in given))


def _usual_folder(trainer: Trainer) -> Path:
    """As Lightning chooses it: by the first logger, where there is one."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / "checkpoints"
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)) / "checkpoints"  # noqa: PTH118 - empty names


def _say(message: str) -> None:
    rank_zero_only(print)(f"lcprune: {message}", file=sys.stderr)
