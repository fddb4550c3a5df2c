"""Which checkpoint `--ckpt_path` means, where it names none.

last    the newest of the run's folder that is whole and serves
hpc     the one that Lightning wrote when SLURM was about to end the job
"""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lcprune.cli.records import formers
from lcprune.distillation.checkpoint import goes_on
from lcprune.distillation.storing import SUFFIX, first_whole
from lcprune.errors import InputError

LAST, OF_SLURM = "last", "hpc"
"""What a `ckpt_path` may be beside a path."""
ELSEWHERE = ("best", "registry")
"""What Lightning takes for one, too: the first is known to the process that has trained, the second needs litmodels."""


def check_name(path: str | Path | None) -> None:
    """Raises InputError for a `ckpt_path` that a new process cannot look up."""
    if path in ELSEWHERE:
        raise InputError(
            f"ckpt_path={path} finds no checkpoint here: name its file, such as RUN/checkpoints/last.ckpt, or say last."
        )


def last_checkpoint(trainer: Trainer) -> Path:
    """The newest whole checkpoint of a run, whatever its name.

    The damaged ones that are newer are named on stderr.

    Raises:
        InputError: None of them is whole, or there is none.
    """
    path, where = _last(trainer, lambda _: True)
    if path is None:
        raise InputError(f"ckpt_path=last: there is no checkpoint yet in {where}: name one, or run fit first.")
    return path


def last_state(trainer: Trainer) -> Path | None:
    """As `last_checkpoint`, the newest that a run can go on from: those of weights alone are passed over, too.

    None where there is no checkpoint yet; stderr says so.

    Raises:
        InputError: There are checkpoints and none of them is such.
    """
    path, where = _last(trainer, goes_on)
    if path is None:
        _say(f"--ckpt_path last: no checkpoint yet in {where}, a new run begins")
    return path


def _last(trainer: Trainer, serves: Callable[[Path], bool]) -> tuple[Path | None, str]:
    """The newest that serves, and where was looked."""
    folders, paths = checkpoint_folders(trainer), checkpoints(trainer)
    former = formers(run_folder(trainer), paths)
    paths = [path for path in paths if path not in former]
    path, skipped = first_whole(paths)
    weights: list[Path] = []
    while path is not None and not serves(path):
        weights.append(path)
        path, skipped = first_whole(other for other in paths if other not in weights)
    passed = [f"{_listed(skipped)} newer, but not whole"] if skipped else []
    passed += [f"{_listed(weights)} newer, but weights without the optimizer's state"] if weights else []
    if path is not None:
        note = f" ({'; '.join(passed)})" if passed else ""
        _say(f"--ckpt_path last: {path}{note}")
    elif weights:
        raise InputError(
            f"ckpt_path=last: {_listed(weights)} holds weights without the optimizer's state (save_weights_only), and "
            "no other checkpoint is whole: export its student (lcprune export) and begin with it (model.student)."
        )
    elif skipped:
        raise InputError(
            f"ckpt_path=last: no checkpoint is whole ({_listed(skipped)}): start a new run without ckpt_path."
        )
    return path, _listed(folders) + (f" ({_listed(former)}: of the run before this one)" if former else "")


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))


def requeued_from(trainer: Trainer) -> Path | None:
    """The checkpoint from which Lightning lets a job go on that SLURM has queued again; None elsewhere."""
    return _newest_of_slurm(trainer) if SLURMEnvironment.detect() else None


def checkpoint_of_slurm(trainer: Trainer) -> Path:
    """The newest checkpoint that Lightning has written for SLURM; raises InputError if there is none."""
    if (path := _newest_of_slurm(trainer)) is None:
        raise InputError(
            f"ckpt_path=hpc: there is no hpc_ckpt_1{SUFFIX} or later in {trainer.default_root_dir}, where a job that "
            "SLURM ends leaves it: name a checkpoint, or say last."
        )
    return path


def _newest_of_slurm(trainer: Trainer) -> Path | None:
    numbered = {
        path.stem.removeprefix("hpc_ckpt_"): path for path in Path(trainer.default_root_dir).glob(f"hpc_ckpt_*{SUFFIX}")
    }
    return max(((int(number), path) for number, path in numbered.items() if number.isdecimal()), default=(0, None))[1]


def run_folder(trainer: Trainer) -> Path:
    """Where the run's metrics, checkpoints and student are; asks all ranks."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def checkpoints(trainer: Trainer) -> list[Path]:
    """All that lie where the run's ModelCheckpoints write, in folders of theirs, too."""
    deep = max((_slashes(callback) for callback in _writers(trainer)), default=0)
    patterns = [f"{'*/' * depth}*{SUFFIX}" for depth in range(deep + 1)]
    return [path for folder in checkpoint_folders(trainer) for pattern in patterns for path in folder.glob(pattern)]


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Where the run's ModelCheckpoints write."""
    given = [callback.dirpath for callback in _writers(trainer)]
    return list(dict.fromkeys(_usual_folder(trainer) if folder is None else Path(folder) for folder in given))


def _writers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _slashes(callback: ModelCheckpoint) -> int:
    """Folders that a file name such as {step}-{val/perplexity:.1f} leads into."""
    return (callback.filename or "").count("/")


def _usual_folder(trainer: Trainer) -> Path:
    """As Lightning chooses it: by the first logger, where there is one."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / "checkpoints"
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)) / "checkpoints"  # noqa: PTH118 - empty names


def _say(message: str) -> None:
    rank_zero_only(print)(f"lcprune: {message}", file=sys.stderr)
