"""When how many layers go. Standard library only.

A schedule is a list of milestones `(when, depth)`: from then on the student has at most that many layers. Milestones
are a pure function of the schedule and the depth at the start, and whether a merge is due now is one of plain `Facts`,
so nothing needs to be remembered for a resume:

    Evenly(target_depth=24, merges=3, first=20, last=120)   30 layers -> 28 at 20, 26 at 70, 24 at 120

Here they are counted in optimizer steps; triggers.py has those that look at something else.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from typing import ClassVar

from lcprune.errors import InputError
from lcprune.merging.depths import layers_left
from lcprune.merging.lineage import MOST_LAYERS

Milestone = tuple[int, int]
"""(when, depth): the depth wanted once `when` optimizer steps (or tokens) are done."""
Deadline = tuple[float, int]
"""(step, depth): the optimizer step by which that depth is reached; infinite where nobody knows."""


@dataclass(frozen=True)
class Facts:
    """What a schedule may look at."""

    step: int
    """Optimizer steps done."""
    begun: int
    """Layers with which the run began."""
    depth: int
    """Layers now."""
    tokens: int = 0
    """Tokens read, over all ranks, padding not."""
    tokens_before: int = -1
    """As many as there were when a schedule was last asked; -1 = it never was."""
    merged: bool = False
    """Whether layers have merged in this run."""
    refused: bool = False
    """Whether a merge of this run was undone, because it cost too much."""
    before: float | None = None
    """Validation perplexity right before the last merge; None = not measured."""
    since: tuple[float, ...] = ()
    """Validation perplexities since then, or since a merge was last tried."""


class Schedule(ABC):
    """When to merge down to which depth. Subclasses are frozen dataclasses with a `milestones` method."""

    unit: ClassVar[str] = "step"
    """What milestones are counted in."""
    by_validation: ClassVar[bool] = False
    """Whether it looks at validation perplexities."""

    @abstractmethod
    def milestones(self, depth: int) -> tuple[Milestone, ...]:
        """All milestones of a run that starts with `depth` layers, in order."""

    def deadlines(self, depth: int) -> tuple[Deadline, ...]:
        """By which optimizer step each depth is reached at the latest, for a run that starts with `depth` layers."""
        return self.milestones(depth)

    def check(self, depth: int, max_steps: int) -> None:
        """Raises InputError if the schedule does not fit the model or the run.

        Args:
            depth: The teacher's number of layers.
            max_steps: The run's number of optimizer steps; -1 = not known.
        """
        milestones = self.milestones(depth)
        previous = depth
        for when, target in milestones:
            if not 1 <= target < depth:
                raise InputError(
                    f"{self}: the target depth {target} must lie between 1 and {depth - 1}, because the model has "
                    f"{depth} layers: change collapse.schedule.target_depth (AtSteps has depths, EveryNSteps layers)."
                )
            if target >= previous:
                raise InputError(f"{self}: depth {target} at {self.unit} {when} does not go below {previous}.")
            previous = target
        times = [when for when, _ in milestones]
        if times != sorted(set(times)) or times[0] < 0:
            raise InputError(f"{self}: the {self.unit}s {times} must grow from 0 on, one merge at a {self.unit}.")
        last = last_known(self.deadlines(depth))
        if 0 <= max_steps <= last:
            raise InputError(
                f"{self}: the merge at step {last} lies at or behind trainer.max_steps={max_steps}, "
                "so nothing could be trained after it: merge earlier or train longer."
            )

    def due(self, facts: Facts) -> int | None:
        """The depth to merge down to right now; None = no merge is due.

        Where a merge was undone, every later milestone takes the next portion and no more: the same merge is tried
        again with more training behind it, and a run ends as many portions short as it had merges undone.
        """
        scheduled = self.reached(facts)
        if scheduled is None or scheduled >= facts.depth:
            return None
        return self.portion(facts) if facts.refused else scheduled

    def reached(self, facts: Facts) -> int | None:
        """The depth of the milestone that has been reached since a schedule was last asked; None = there is none."""
        return dict(self.milestones(facts.begun)).get(facts.step)

    def portion(self, facts: Facts) -> int | None:
        """The next of its depths; None = there is none."""
        return next((depth for _, depth in self.milestones(facts.begun) if depth < facts.depth), None)

    def position(self, facts: Facts) -> int:
        """How far the run has come, in steps or tokens: milestones before are past."""
        return facts.step

    def missed(self, facts: Facts) -> list[str]:
        """Milestones that are past although the student is deeper, in words; they are not made up for."""
        milestones, position = self.milestones(facts.begun), self.position(facts)
        return [
            f"{depth} layers at {self.unit} {when}"
            for when, depth in milestones
            if when < position and depth < facts.depth
        ]

    def target(self, depth: int) -> int:
        """The depth after the last milestone."""
        return self.milestones(depth)[-1][1]


def last_known(deadlines: tuple[Deadline, ...]) -> int:
    """The last optimizer step of those that are known; 0 = none is."""
    return int(max((step for step, _ in deadlines if step != inf), default=0))


class StepSchedule(Schedule):
    """Merges at optimizer steps that are known beforehand."""


@dataclass(frozen=True)
class AtSteps(StepSchedule):
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
class EveryNSteps(StepSchedule):
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
class Evenly(StepSchedule):
    """Reaches a target depth in equal portions at equal distances."""

    target_depth: int | str
    """Number of layers at the end, or such a share as 75% of those at the start, to the nearest whole one."""
    merges: int = 1
    """Number of merges; earlier ones take the odd layer."""
    first: int = 0
    """Step of the first merge."""
    last: int | None = None
    """Step of the last merge; needed for more than one."""

    def __post_init__(self) -> None:
        if layers_left(self.target_depth, MOST_LAYERS) < 1:
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
        target = layers_left(self.target_depth, depth)
        layers = depth - target
        if layers < 1:
            return ((self.first, target),)
        merges = min(self.merges, layers)
        last = self.first if self.last is None else self.last
        distance = Fraction(last - self.first, max(merges - 1, 1))
        gone = [-(-layers * (index + 1) // merges) for index in range(merges)]
        return tuple((self.first + round(distance * index), depth - gone[index]) for index in range(merges))
