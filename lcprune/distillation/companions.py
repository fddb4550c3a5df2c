"""Lightning's callbacks beside ours: which cannot work, or live through a merge, and what others have to forget at one.

ModelCheckpoint     the best begins anew at every depth; the files of earlier depths stay
EarlyStopping       its patience refers to the new depth
WeightAveraging     its averages merge too, see averaging.py
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from lcprune.distillation.metrics import HELD_OUT
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.throughput import Throughput
from lcprune.errors import InputError

REFUSED = {"BatchSizeFinder", "LearningRateFinder", "ModelPruning", "StochasticWeightAveraging"}
"""Those that keep or restore weights of the old depth, or mask them by name; by name, some came after lightning 2.5."""
NEVER = {
    "LearningRateFinder": "looks for a learning rate in the module, and only model.optimizer has one",
    "ModelPruning": "looks for weights before the student is loaded, and finds none to prune",
}
"""Those that an lcprune.DistillationModule has nothing for, whether layers merge or not."""
OF_THE_TRAINER = ("epoch", "step")
"""What the trainer counts itself."""
SPEED = ("train/tokens_per_second", "train/scored_per_second", "train/mfu")
"""What Throughput logs."""


def check_always(trainer: Trainer, module: DistillationModule) -> None:
    """Raises InputError for callbacks that a run without merges cannot have either.

    Args:
        trainer: With the callbacks; metrics that one of the user's own might log are not looked at.
        module: That is trained.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if why := next((NEVER[base.__name__] for base in type(callback).__mro__ if base.__name__ in NEVER), None):
            raise InputError(f"trainer.callbacks: {type(callback).__name__} {why}: remove it.")
    if type(module) is not DistillationModule or not all(_is_known(callback) for callback in callbacks):
        return
    logged = _logged(module, callbacks)
    for callback in callbacks:
        watched = callback.monitor if isinstance(callback, EarlyStopping | ModelCheckpoint) else None
        if watched is not None and watched not in (*logged, *OF_THE_TRAINER) and not _is_rate(watched, callbacks):
            near = get_close_matches(watched, logged, 1)
            guess = f", did you mean {near[0]}?" if near else ":"
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__} has monitor={watched}, which this run does not "
                f"log{guess} name one of {', '.join(logged)}."
            )


def _logged(module: DistillationModule, callbacks: Sequence[Callback]) -> list[str]:
    """Names of the metrics that a callback can watch."""
    terms = dict.fromkeys(type(level).__name__.lower() for phase in module.phases for level in phase.objective)
    speed = SPEED if any(isinstance(callback, Throughput) for callback in callbacks) else ()
    held_out = (f"val/{name}" for name in HELD_OUT)
    return [*held_out, "train/loss", *(f"train/{name}" for name in terms), "depth", *speed]


def _is_known(callback: Callback) -> bool:
    """Whether it is known what it logs: only ours and Lightning's are, but for one that calls the user's functions."""
    room = type(callback).__module__.partition(".")[0]
    return room in ("lcprune", "lightning", "pytorch_lightning") and type(callback).__name__ != "LambdaCallback"


def _is_rate(watched: str, callbacks: Sequence[Callback]) -> bool:
    """Whether it is a learning rate, or a momentum, under the name that Lightning makes of optimizer and group."""
    return watched.startswith("lr-") and any(isinstance(callback, LearningRateMonitor) for callback in callbacks)


def check(trainer: Trainer) -> None:
    """Raises InputError for callbacks that a merge would break, or that would write over the best of a depth."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not REFUSED.isdisjoint(base.__name__ for base in type(callback).__mro__):
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__} holds on to weights that a merge takes away: remove it."
            )
        if isinstance(callback, ModelCheckpoint) and _has_one_name(callback):
            raise InputError(
                f"trainer.callbacks: ModelCheckpoint with filename={callback.filename!r} and "
                "enable_version_counter=False writes the best of every depth over that of the one before: put "
                "{depth:.0f} into the name, like best-{depth:.0f}."
            )


def _has_one_name(callback: ModelCheckpoint) -> bool:
    keeps_best = callback.monitor is not None and callback.save_top_k != 0
    fields = None if callback.filename is None else set(re.findall(r"\{(\w+)", callback.filename))
    # Two depths may fall into one epoch.
    return keeps_best and fields is not None and fields <= {"epoch"} and not callback._enable_version_counter


def forget_best(trainer: Trainer) -> None:
    """The best score and the patience so far belong to a deeper student."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            callback.best_model_score, callback.best_model_path = None, ""
            callback.kth_best_model_path = ""
            callback.best_k_models = {}
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(torch.inf if callback.monitor_op == torch.lt else -torch.inf)
