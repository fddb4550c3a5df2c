"""The optimizer across a merge: whose state goes, whose starts afresh, and how the learning rate warms up again.

The optimizer and its `param_groups` stay the same objects, because schedulers and strategies hold on to them. The
absorbed layers' Parameters leave (or norms, counts, memory and resume would be wrong). The merged layer's Parameters
stay, but what Adam knew of them belongs to other weights: their state is zeroed, step count included, so that its
bias correction starts afresh too; it is not removed, because a missing state cannot be resumed everywhere.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn import Parameter
from torch.optim import SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from lcprune.errors import InputError
from lcprune.merging.surgery import Outcome

STARTS_AT_ZERO = (Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, RAdam, RMSprop, SGD)
"""Optimizers whose state per Parameter is all zeros at first and belongs to that Parameter alone."""
OF_THE_RUN = ("params", "param_names")
"""In a param group: what is no setting."""
STARTS_AT_ZERO_IN_8_BIT = ("AdamW8bit", "PagedAdamW8bit")
"""bitsandbytes' optimizers of which that holds too; by name, to import it only where models are packed."""


def check(optimizer: Optimizer) -> None:
    """Raises InputError for an optimizer whose state cannot start afresh at zero."""
    if not (isinstance(optimizer, STARTS_AT_ZERO) or type(optimizer).__name__ in STARTS_AT_ZERO_IN_8_BIT):
        known = (*(kind.__name__ for kind in STARTS_AT_ZERO), *STARTS_AT_ZERO_IN_8_BIT)
        raise InputError(
            f"model.optimizer={type(optimizer).__name__} is not known to keep a state that starts at zero, which a "
            f"merged layer's has to: use one of {', '.join(known)}."
        )

    filled = [value for group in optimizer.param_groups if (value := group.get("initial_accumulator_value"))]
    if filled:
        raise InputError(
            f"model.optimizer: initial_accumulator_value={filled[0]} of {type(optimizer).__name__} is not the zero at "
            "which a merged layer's state starts afresh: leave it out."
        )


def carry_over(optimizer: Optimizer, outcome: Outcome) -> None:
    """Adjusts an optimizer in place to a merge; Parameters are told apart by identity.

    Args:
        optimizer: One that `check` accepts.
        outcome: What `surgery.apply` touched.
    """
    removed = {id(parameter) for parameter in outcome.removed}
    for group in optimizer.param_groups:
        _keep(group, [id(parameter) not in removed for parameter in group["params"]])
    for parameter in outcome.removed:
        optimizer.state.pop(parameter, None)
    for parameter in outcome.merged:
        _zero(optimizer.state.get(parameter, {}))
    forget_gradients(outcome.merged + outcome.removed)


def _zero(state: dict[str, object]) -> None:
    for name, value in state.items():
        # bitsandbytes: qmap1 and qmap2 are what its 8-bit codes stand for, shared by all Parameters; step is an int.
        if isinstance(value, torch.Tensor) and not name.startswith("qmap"):
            value.zero_()
        elif name == "step":
            state[name] = 0


def _keep(group: dict, staying: list[bool]) -> None:  # type: ignore[type-arg]
    """Cuts the lists of a param group that run along its Parameters."""
    for name in OF_THE_RUN:
        if name in group:
            group[name][:] = [item for item, stays in zip(group[name], staying, strict=True) if stays]


def forget_gradients(parameters: Collection[Parameter]) -> None:
    """Drops gradients, which belong to weights that are gone."""
    for parameter in parameters:
        parameter.grad = None


def settings(optimizer: Optimizer) -> list[dict[str, object]]:
    """What was asked for when it was made, group by group: learning rate, weight decay ..."""
    return [
        {name: value for name, value in group.items() if name not in OF_THE_RUN} for group in optimizer.param_groups
    ]


def take_over(optimizer: Optimizer, asked: list[dict[str, object]], scheduler: object) -> None:
    """Gives an optimizer out of a checkpoint the settings that it was made with, where they are others.

    Args:
        optimizer: With the checkpoint's state.
        asked: Its `settings` before that was loaded.
        scheduler: Of its learning rate, which then is the scheduler's matter; None = there is none.
    """
    for group, mine in zip(optimizer.param_groups, asked, strict=True):
        if scheduler is not None and not isinstance(scheduler, Rewarming):  # it may move any of them
            if (was := group.get("initial_lr")) != (now := mine.get("initial_lr")):
                rank_zero_warn(
                    f"model.optimizer: the checkpoint's learning rate {was} stays and {now} is not used, because "
                    f"{type(scheduler).__name__} goes on with its own: begin a run with model.student for another one"
                )
            continue
        of_scheduler = () if scheduler is None else ("lr", "initial_lr")
        wanted = {name: value for name, value in mine.items() if name in group and name not in of_scheduler}
        if told := _changes(group, wanted):
            group.update(wanted)
            rank_zero_info(f"{type(optimizer).__name__}, other than in the checkpoint, from here on: {told}")


def _changes(was: Mapping[str, object], asked: Mapping[str, object]) -> str:
    """What is asked for and was otherwise, in words; empty if nothing."""
    return ", ".join(f"{name} {value} (was {was[name]})" for name, value in asked.items() if was[name] != value)


class Rewarming(LambdaLR, ABC):
    """A learning rate that warms up, follows a curve, and warms up again for a short while after every merge.

    Args:
        optimizer: Its learning rates are the peak.
        curve: The multiplier.
        last_epoch: As in torch's schedulers.
    """

    @abstractmethod
    def __init__(self, optimizer: Optimizer, curve: "_Curve", last_epoch: int = -1) -> None:
        wrong = curve.mistakes()
        if wrong:
            raise InputError(f"{type(self).__name__}: {'; '.join(wrong)}.")
        super().__init__(optimizer, curve, last_epoch)

    @property
    def curve(self) -> "_Curve":
        """The multiplier; an attribute of ours would be pickled into every checkpoint."""
        curve = self.lr_lambdas[0]
        assert isinstance(curve, _Curve)
        return curve

    def set_total_steps(self, steps: int) -> None:
        """Tells a curve that was made without `total_steps` the length of the run; a resume may have changed it."""
        if self.curve.follows_run:
            self.curve.total_steps = max(1, steps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but a peak and a curve that were set otherwise since the checkpoint count from here on."""
        peaks, asked = list(self.base_lrs), self.curve.settings
        super().load_state_dict(state_dict)
        was = {"lr": self.base_lrs, **self.curve.settings}
        if told := _changes(was, {"lr": peaks, **asked}):
            self.base_lrs = peaks
            vars(self.curve).update(asked)
            self._set_rates()
            for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
                group["initial_lr"] = peak
            rank_zero_info(f"{type(self).__name__}, other than in the checkpoint, from here on: {told}")

    def rewarm(self) -> None:
        """Begins a warm-up now: the next optimizer step is its first."""
        self.curve.restarts = [*self.curve.restarts, self.last_epoch]
        self._set_rates()

    def _set_rates(self) -> None:
        rates = [rate * self.curve(self.last_epoch) for rate in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


class RewarmingCosine(Rewarming):
    """Linear warm-up, cosine decay to a floor, and a short warm-up again after every merge.

    Args:
        optimizer: Its learning rates are the peak.
        warmup_steps: Optimizer steps from 0 to the peak at the start.
        rewarm_steps: Optimizer steps over which the rate climbs back to the curve after a merge.
        floor: Fraction of the peak at the end.
        total_steps: Optimizer steps of the whole curve; None = the run's own number.
        last_epoch: As in torch's schedulers.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int = 100,
        rewarm_steps: int = 20,
        floor: float = 0.1,
        total_steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, _Cosine(warmup_steps, rewarm_steps, floor, total_steps), last_epoch)


class RewarmingWSD(Rewarming):
    """Warm-up, stable at the peak, decay at the end (WSD, arXiv:2404.06395); a short warm-up again after every merge.

    The decay is 1 - sqrt(share of it that is over), which did better than a line (arXiv:2405.18392). Until it begins
    nothing depends on the length of the run: one that is resumed from there with more steps goes on at the peak.

    Args:
        optimizer: Its learning rates are the peak.
        warmup_steps: Optimizer steps from 0 to the peak at the start.
        rewarm_steps: Optimizer steps over which the rate climbs back to the curve after a merge.
        decay: Share of the whole curve, from 0 to 1, that the decay at its end takes.
        floor: Fraction of the peak at the end.
        total_steps: Optimizer steps of the whole curve; None = the run's own number.
        last_epoch: As in torch's schedulers.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int = 100,
        rewarm_steps: int = 20,
        decay: float = 0.2,
        floor: float = 0.0,
        total_steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, _StableDecay(warmup_steps, rewarm_steps, floor, total_steps, decay), last_epoch)


class _Curve(ABC):
    """The multiplier as a callable object: LambdaLR saves and restores its attributes with a checkpoint."""

    def __init__(self, warmup_steps: int, rewarm_steps: int, floor: float, total_steps: int | None) -> None:
        self.warmup_steps, self.rewarm_steps = warmup_steps, rewarm_steps
        self.floor, self.total_steps = floor, total_steps
        self.follows_run = total_steps is None
        self.restarts: list[int] = []

    @property
    def settings(self) -> dict[str, object]:
        """What a recipe says of it, and not the run."""
        run = {"restarts"} | ({"total_steps"} if self.follows_run else set())
        return {name: value for name, value in vars(self).items() if name not in run}

    def mistakes(self) -> list[str]:
        """What is wrong with its numbers."""
        steps = {"warmup_steps": self.warmup_steps, "rewarm_steps": self.rewarm_steps}
        wrong = [f"{name}={value} must not be negative" for name, value in steps.items() if value < 0]
        if not 0 <= self.floor <= 1:
            wrong.append(f"floor={self.floor} must lie between 0 and 1")
        if self.total_steps is not None and self.total_steps < 1:
            wrong.append(f"total_steps={self.total_steps} must be positive")
        return wrong

    def __call__(self, step: int) -> float:
        factor = 1.0
        if step < self.warmup_steps:
            factor = (step + 1) / (self.warmup_steps + 1)
        elif self.total_steps is not None:
            factor = self.floor + (1 - self.floor) * self.height(step, self.total_steps)
        if self.restarts:
            factor *= min(1.0, (step - self.restarts[-1] + 1) / (self.rewarm_steps + 1))
        return factor

    @abstractmethod
    def height(self, step: int, total: int) -> float:
        """How far above the floor, from 1 down to 0, behind the warm-up."""


class _Cosine(_Curve):
    def height(self, step: int, total: int) -> float:
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return (1 + math.cos(math.pi * min(1.0, done))) / 2


class _StableDecay(_Curve):
    def __init__(
        self, warmup_steps: int, rewarm_steps: int, floor: float, total_steps: int | None, decay: float
    ) -> None:
        super().__init__(warmup_steps, rewarm_steps, floor, total_steps)
        self.decay = decay

    def mistakes(self) -> list[str]:
        """Those of every curve, and a decay that is no share."""
        wrong = [] if 0 <= self.decay <= 1 else [f"decay={self.decay} must lie between 0 and 1"]
        return super().mistakes() + wrong

    def height(self, step: int, total: int) -> float:
        # Counted back from the end, so that the steps before the decay do not depend on where the end is.
        length = min(round(self.decay * total), total - self.warmup_steps)
        done = (step - (total - length)) / max(1, length)
        return 1 - math.sqrt(min(1.0, max(0.0, done)))
