"""A signal that asks the run to end, or to be queued again, is answered between two optimizer steps.

    SIGTERM          the step is finished with its merge, a checkpoint is written, the process ends with status 143
    SIGUSR1, 2       what was to be done at once (Lightning's checkpoint for SLURM) is done at that same instant

Lightning's own answers come at any instant: its SLURM handler writes a checkpoint wherever the signal finds the run,
and with several ranks its SIGTERM handler starts a broadcast in the middle of whatever the ranks exchange. Here a
handler only takes note, and the ranks agree on the step at which they stop: one of them having been told is enough.
"""

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lcprune.errors import InputError

STATUS = 128 + signal.SIGTERM
"""Exit status of a run that SIGTERM ended: 143."""
FILE = "sigterm.ckpt"
"""The checkpoint it leaves, in the folder of the others."""

Handler = Callable[[int, FrameType | None], object]


class Terminated(SIGTERMException):
    """SIGTERM ended the run, and a checkpoint holds all of it."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(STATUS)
        self.step = step
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"stopped by SIGTERM after optimizer step {self.step}: go on with --ckpt_path {self.checkpoint}"


class SaveOnSignal(Callback):
    """Ends a run on SIGTERM with a checkpoint from which it goes on exactly; the last in `trainer.callbacks`.

    The command line adds it by itself.
    """

    def __init__(self) -> None:
        self._terminated = False
        self._deferred: dict[int, Handler] = {}
        self._wanted: set[int] = set()
        self._step_before = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a place in front of a callback that changes the student; a new run has been told nothing yet."""
        self._terminated, self._wanted = False, set()
        after = trainer.callbacks[trainer.callbacks.index(self) + 1 :]  # type: ignore[attr-defined]
        late = next((type(each).__name__ for each in after if type(each).__name__ == "ProgressiveCollapse"), None)
        if late is not None:
            raise InputError(f"trainer.callbacks: SaveOnSignal stands before {late}: put it last.")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the place of Lightning's handlers, which are there by now."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As above, where there is no sanity check."""
        self._listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Remembers, for the length of the batch, how many optimizer steps were done before it."""
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Where this batch has completed an optimizer step, does what a signal has asked for."""
        if trainer.global_step == self._step_before:
            return
        asked = set(self._wanted)  # what comes from now on is answered behind the next step
        if not _anyone(trainer, self._terminated or bool(asked)):
            return
        for number in sorted(self._deferred):
            if _anyone(trainer, number in asked):  # once: a rank that is told later has done it with the others
                self._deferred.pop(number)(number, None)
        self._wanted -= asked
        if _anyone(trainer, self._terminated):
            path = _folder(trainer) / FILE
            trainer.save_checkpoint(path)
            raise Terminated(trainer.global_step, path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that went on from the checkpoint of its stop and has reached its end needs it no more."""
        path = _folder(trainer) / FILE
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == path.resolve():
            trainer.strategy.remove_checkpoint(path)  # one that this run did not go on from is another's

    def _listen(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals are the main thread's
        self._terminated |= trainer.received_sigterm
        signal.signal(signal.SIGTERM, self._take_note)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._take_note:
                self._deferred[number] = handler
                signal.signal(number, self._take_note)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._terminated = True
        else:
            self._wanted.add(number)


def _anyone(trainer: Trainer, wanted: bool) -> bool:
    return trainer.strategy.reduce_boolean_decision(wanted, all=False)


def _folder(trainer: Trainer) -> Path:
    """Where the run's checkpoints are."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            return Path(callback.dirpath)
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
