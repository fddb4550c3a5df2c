"""Lightning's callbacks beside ours: which cannot live through a merge, and what the others have to forget at one.

ModelCheckpoint     the best begins anew at every depth; the files of earlier depths stay
EarlyStopping       its patience refers to the new depth
WeightAveraging     its averages merge too, see averaging.py
"""

import re

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lcprune.errors import InputError

REFUSED = {"BatchSizeFinder", "LearningRateFinder", "ModelPruning", "StochasticWeightAveraging"}
"""Those that keep or restore weights of the old depth, or mask them by name; by name, some came after lightning 2.5."""


def check(trainer: Trainer) -> None:
    """Raises InputError for callbacks that a merge would break, or that would write over the best of a depth."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not REFUSED.isdisjoint(base.__name__ for base in type(callback).__mro__):
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__} holds on to weights that a merge takes away: "
                "remove it, or train it after the last merge in a run of its own."
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
