"""At which optimizer steps how many layers go. Standard library only.

A schedule is a list of milestones `(global_step, depth)`: once that many optimizer steps are done, the student has at
most that many layers. Milestones are a pure function of the schedule and the teacher's depth, so nothing needs to be
remembered for a resume:

    Evenly(target_depth=24, merges=3, first=20, last=120)   30 layers -> 28 at 20, 26 at 70, 24 at 120
"""

from dataclasses import dataclass
from fractions import Fraction

from lcprune.errors import InputError

Milestone = tuple[int, int]
"""(global_step, depth): the depth wanted once `global_step` optimizer steps are done."""


class Schedule:
    """When to merge down to which depth. Subclasses are frozen dataclasses with a `milestones` method."""

    def milestones(self, depth: int) -> tuple[Milestone, ...]:
        """All milestones of a run that starts with `depth` layers, in order."""
        raise NotImplementedError

    def check(self, depth: int, max_steps: int) -> None:
        """Raises InputError if the schedule does not fit the model or the run.

        Args:
            depth: The teacher's number of layers.
            max_steps: The run's number of optimizer steps; -1 = not known.
        """
        milestones = self.milestones(depth)
        previous = depth
        for step, target in milestones:
            if not 1 <= target < depth:
                raise InputError(
                    f"{self}: the target depth {target} must lie between 1 and {depth - 1}, "
                    f"because the model has {depth} layers."
                )
            if target >= previous:
                raise InputError(f"{self}: depth {target} at step {step} does not go below {previous}.")
            previous = target
        steps = [step for step, _ in milestones]
        if steps != sorted(set(steps)) or steps[0] < 0:
            raise InputError(f"{self}: the steps {steps} must grow from 0 on, one merge at a step.")
        if 0 <= max_steps <= steps[-1]:
            raise InputError(
                f"{self}: the merge at step {steps[-1]} lies at or behind trainer.max_steps={max_steps}, "
                "so nothing could be trained after it: merge earlier or train longer."
            )

    def due(self, global_step: int, depth: int) -> int | None:
        """The depth to merge down to right now, after `global_step` optimizer steps; None = no merge is due.

        Args:
            global_step: Number of optimizer steps done.
            depth: The teacher's number of layers.
        """
        return dict(self.milestones(depth)).get(global_step)

    def target(self, depth: int) -> int:
        """The depth after the last milestone."""
        return self.milestones(depth)[-1][1]


@dataclass(frozen=True)
class AtSteps(Schedule):
    """Merges at the given steps down to the given depths."""

    depths: dict[int, int]
    """Optimizer step -> depth, e.g. {20: 27, 120: 24}."""

    def __post_init__(self) -> None:
        if not self.depths:
            raise InputError("depths={} of AtSteps is empty: name at least one step and depth, like {100: 24}.")

    def milestones(self, depth: int) -> tuple[Milestone, ...]:
        """The given pairs, by step."""
        return tuple(sorted(self.depths.items()))


@dataclass(frozen=True)
class EveryNSteps(Schedule):
    """Takes the same number of layers away at regular steps."""

    every: int
    """Optimizer steps between two merges."""
    first: int
    """Step of the first merge."""
    last: int
    """No merge after this step."""
    layers: int = 1
    """Layers that go at every merge."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.layers < 1 or not 0 <= self.first <= self.last:
            raise InputError(
                f"EveryNSteps: every={self.every} and layers={self.layers} must be at least 1, "
                f"and 0 <= first={self.first} <= last={self.last} must hold."
            )

    def milestones(self, depth: int) -> tuple[Milestone, ...]:
        """Steps first, first + every, ... up to last."""
        steps = range(self.first, self.last + 1, self.every)[:depth]  # after so many nothing is left
        return tuple((step, depth - self.layers * (index + 1)) for index, step in enumerate(steps))


@dataclass(frozen=True)
class Evenly(Schedule):
    """Reaches a target depth in equal portions at equal distances."""

    target_depth: int
    """Number of layers at the end."""
    merges: int = 1
    """Number of merges; earlier ones take the odd layer."""
    first: int = 0
    """Step of the first merge."""
    last: int | None = None
    """Step of the last merge; needed for more than one."""

    def __post_init__(self) -> None:
        if self.target_depth < 1:
            raise InputError(f"target_depth={self.target_depth} must be at least 1 and below the model's depth.")
        if self.merges < 1 or self.first < 0:
            raise InputError(f"Evenly: merges={self.merges} must be at least 1 and first={self.first} not negative.")
        if self.merges == 1 and self.last not in (None, self.first):
            raise InputError(f"Evenly: last={self.last} means nothing with merges=1: drop it or ask for more merges.")
        if self.merges > 1 and (self.last is None or self.last - self.first < self.merges - 1):
            raise InputError(
                f"Evenly: merges={self.merges} need last={self.last} to lie at least {self.merges - 1} steps "
                f"after first={self.first}."
            )

    def milestones(self, depth: int) -> tuple[Milestone, ...]:
        """`merges` milestones from `first` to `last`; fewer if there are fewer layers than merges to take."""
        layers = depth - self.target_depth
        if layers < 1:
            return ((self.first, self.target_depth),)
        merges = min(self.merges, layers)
        last = self.first if self.last is None else self.last
        distance = Fraction(last - self.first, max(merges - 1, 1))
        gone = [-(-layers * (index + 1) // merges) for index in range(merges)]
        return tuple((self.first + round(distance * index), depth - gone[index]) for index in range(merges))
