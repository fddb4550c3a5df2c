"""What a run has logged stays: CSVLogger deletes the metrics.csv that it finds, whatever command it logs for.

fit                  what an earlier run has left of its account goes into former.1 and so on, and it is noted there
                     which checkpoints are its: they stay where they are, and `--ckpt_path last` passes them over
fit --ckpt_path      the metrics so far become metrics.1.csv and so on
fast_dev_run         a trial of the code: it writes nothing, and removes nothing
validate, test       log into validate.csv, test.csv
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lcprune.delivery.export import RECIPE
from lcprune.delivery.runs import EVALUATION, FIGURES, TEMPLATE
from lcprune.delivery.training_log import METRICS, numbered
from lcprune.files import write_text

CHECKPOINTS = "checkpoints.json"
"""In former.1 and so on: the checkpoints of that run, from the run's folder, and when they were written (ns)."""


def say_where(folder: Path, asked: str | None) -> None:
    """Warns where a logger keeps a run elsewhere than in the trainer.default_root_dir that a recipe asks for."""
    named = None if asked is None else Path(asked).resolve()
    if named is not None and named not in (folder.resolve(), *folder.resolve().parents):
        rank_zero_warn(
            f"the run is kept in {folder}, where trainer.logger writes, and not in trainer.default_root_dir={asked}: "
            "to move it, set the logger's save_dir, too"
        )


def leave_nothing(trainer: Trainer) -> None:
    """Takes the callbacks away that write checkpoints: Lightning's write `last` at the end of a fast_dev_run, too."""
    kept = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]  # type: ignore[attr-defined]
    trainer.callbacks = kept  # type: ignore[attr-defined]


@rank_zero_only
def put_aside(folder: Path, checkpoints: Iterable[Path]) -> None:
    """Moves the account of an earlier run, if one is here, where nobody takes it for the one that begins."""
    if not (folder / RECIPE).is_file():  # files of these names are not a run's
        return
    there, stamps = _account(folder), dict(_stamp(path, folder) for path in checkpoints)
    if there or stamps:
        numbers = (int(path.suffix[1:]) for path in folder.glob("former.*") if path.suffix[1:].isdecimal())
        aside = folder / f"former.{1 + max(numbers, default=0)}"
        aside.mkdir()
        for path in there:
            path.rename(aside / path.name)
        write_text(aside / CHECKPOINTS, json.dumps(stamps, indent=2))


def formers(folder: Path, checkpoints: Iterable[Path]) -> list[Path]:
    """Those of the checkpoints that a run has left which was put aside."""
    noted = [json.loads(path.read_text(encoding="utf-8")).items() for path in folder.glob(f"former.*/{CHECKPOINTS}")]
    return [path for path in checkpoints if any(_stamp(path, folder) in items for items in noted)]


def _stamp(checkpoint: Path, folder: Path) -> tuple[str, int]:
    return os.path.relpath(checkpoint, folder), checkpoint.stat().st_mtime_ns


@rank_zero_only
def keep_template(folder: Path, template: str | None) -> None:
    """Keeps what conversations are written by beside the recipe: its own file may go, and the student needs it."""
    if template is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / TEMPLATE, template)


def _account(folder: Path) -> list[Path]:
    """What says how a run went."""
    names = [METRICS, *(f"metrics.{number}.csv" for number in numbered(folder)), FIGURES, EVALUATION, TEMPLATE]
    return [folder / name for name in names if (folder / name).is_file()]


@rank_zero_only
def keep_metrics(folder: Path) -> None:
    """Moves the metrics of a run that is resumed out of the way of those to come."""
    metrics = folder / METRICS
    if metrics.is_file():
        number = 1 + max(numbered(folder), default=0)
        metrics.rename(metrics.with_name(f"metrics.{number}.csv"))


@rank_zero_only
def log_apart(loggers: Iterable[Logger], command: str) -> None:
    """Lets every CSVLogger write a file that is named after the command, beside the metrics of training."""
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            logger._experiment = _writer(command)(logger.log_dir)  # the logger itself knows one name alone


def _writer(command: str) -> type[ExperimentWriter]:
    return type("Writer", (ExperimentWriter,), {"NAME_METRICS_FILE": f"{command}.csv"})
