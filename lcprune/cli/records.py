"""What a run has logged stays: CSVLogger deletes the metrics.csv that it finds, whatever command it logs for.

fit                  what an earlier run has left of its account lies in former/, and no account mixes two runs
fit --ckpt_path      the metrics so far become metrics.1.csv and so on
validate, test       log into validate.csv, test.csv
"""

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lcprune.delivery.export import RECIPE
from lcprune.delivery.runs import EVALUATION, FIGURES
from lcprune.delivery.training_log import METRICS, numbered

FORMER = "former"


@rank_zero_only
def put_aside(folder: Path) -> None:
    """Moves the account of an earlier run, if one is here, where nobody takes it for the one that begins."""
    if not (folder / RECIPE).is_file():  # files of these names are not a run's
        return
    there, aside = _account(folder), folder / FORMER
    if there:
        aside.mkdir(exist_ok=True)
        for path in _account(aside):
            path.unlink()
    for path in there:
        path.rename(aside / path.name)


def _account(folder: Path) -> list[Path]:
    """What says how a run went."""
    names = [METRICS, *(f"metrics.{number}.csv" for number in numbered(folder)), FIGURES, EVALUATION]
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
