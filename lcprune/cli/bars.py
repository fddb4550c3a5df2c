"""Progress of planning and merging on stderr: bars on a terminal, else one line per finished stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lcprune.merging.progress import reporting

DEEPEST = 2
"""Bars shown at once: the outermost stage and the one inside it."""


@contextmanager
def shown() -> Iterator[None]:
    """Shows what `lcprune.merging.progress.track` reports inside the block: how far, since when, how much longer."""
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bars, reporting(_Stages(bars)):
        yield


class TrainingBar(RichProgressBar):
    """Lightning's, for runs that end by steps: they have no last epoch, and do not read all of the one they end in."""

    @property
    def total_train_batches(self) -> int | float:
        """How many batches of this epoch are read."""
        trainer = self.trainer
        whole: int | float = trainer.num_training_batches
        if trainer.max_steps < 0:
            return whole
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(whole, trainer.fit_loop.epoch_loop.batch_progress.current.completed + left)

    def _get_train_description(self, current_epoch: int) -> str:
        # `Epoch 0/-2` is no answer.
        return super()._get_train_description(current_epoch).replace("/-2", "   ")  # as wide, or the bar would jump


@dataclass(frozen=True)
class _Stage:
    what: str
    started: float
    bar: TaskID | None


class _Stages:
    """The stages that are under way, outermost first; called with every report."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._open: list[_Stage] = []

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Takes a report, see `lcprune.merging.progress.Reporter`."""
        names = [stage.what for stage in self._open]
        if what not in names:
            bar = self._bars.add_task(what, total=total) if len(names) < DEEPEST else None
            self._open.append(_Stage(what, time.monotonic(), bar))
        else:
            # Whatever began inside of this stage is over.
            self._close(names.index(what) + 1)
        stage = self._open[-1]
        if stage.bar is not None:
            self._bars.update(stage.bar, completed=done, total=total)
        if done == total:
            if len(self._open) == 1 and not self._bars.console.is_terminal:
                self._bars.console.print(f"{what}: {done} in {time.monotonic() - stage.started:.1f} s", soft_wrap=True)
            self._close(len(self._open) - 1)

    def _close(self, first: int) -> None:
        """Ends the stages from this place on."""
        for stage in self._open[first:]:
            if stage.bar is not None:
                self._bars.remove_task(stage.bar)
        del self._open[first:]
