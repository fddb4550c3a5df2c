"""The trainer of a recipe: what is added to it, and what Lightning takes and does nothing sensible with."""

import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from lightning import pytorch as lightning
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lcprune.cli.bars import TrainingBar
from lcprune.cli.messages import cause_of, one_line
from lcprune.distillation.storing import AtomicCheckpointIO
from lcprune.errors import InputError


class Trainer(lightning.Trainer):  # of the same name, by which Lightning looks for PL_TRAINER_MAX_STEPS and so on
    """Lightning's trainer, every aspect of it, with a folder for every run."""

    @property
    def log_dir(self) -> str:
        """Where the first logger writes, or default_root_dir where that keeps no files; asks all ranks."""
        return super().log_dir or self.default_root_dir


def complete(settings: MutableMapping[str, object]) -> None:
    """Adds the Rich progress bar unless the recipe has another or wants none, and checkpoints that are whole.

    Args:
        settings: Of the trainer, by name; changed in place.
    """
    callbacks = _listed(settings.get("callbacks"))
    wanted = settings.get("enable_progress_bar") is not False and not settings.get("barebones")
    if wanted and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        bar: Callback = TrainingBar(leave=False)
        settings["callbacks"] = [*callbacks, bar]
    plugins = _listed(settings.get("plugins"))
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        settings["plugins"] = [*plugins, AtomicCheckpointIO()]


def _listed(given: object) -> list[object]:
    """Lightning takes one for a list of one."""
    return given if isinstance(given, list) else [given] if given else []


@contextmanager
def mistakes_in_words() -> Iterator[None]:
    """Around the making of a trainer: what Lightning says of settings that do not go together is the user's to read.

    Raises:
        InputError: They do not.
    """
    try:
        yield
    except (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException) as error:
        raise cause_of(error) or InputError(f"trainer: {one_line(error)}.") from error
    except RuntimeError as error:
        if twice := re.search(r"more than one stateful callback of type `(\w+)`", str(error)):
            raise InputError(
                f"trainer.callbacks holds {twice[1]} twice with settings that its checkpoints cannot tell apart: "
                "leave one of them out, or give them different ones."
            ) from error
        raise


def check_amounts(trainer: lightning.Trainer) -> None:
    """Raises InputError for numbers that no command can do with."""
    if trainer.accumulate_grad_batches < 1:
        raise InputError(f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} must be 1 or more.")
    clip = trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < float("inf"):
        raise InputError(f"trainer.gradient_clip_val={clip} must not be negative: leave it out to clip nothing.")


def check_trains(trainer: lightning.Trainer) -> None:
    """Raises InputError for a run without a single optimizer step, whose student would be delivered as it began."""
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if (value := getattr(trainer, name)) == 0:
            raise InputError(
                f"trainer.{name}={value} trains nothing: raise it, or merge without training (lcprune collapse)."
            )
