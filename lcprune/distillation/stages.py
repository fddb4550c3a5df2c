"""What a run merges with, which may change on its way down.

    collapse:
      operator: Drop                                        # 22 layers and below: planner, operator, refit of the run
      stages:
        - {until_depth: 26, operator: Drop}                 # merges down to 26 layers or more
        - {until_depth: 22, operator: Concat, refit: RidgeRefit}

A stage says what is different in it. What a merge was made with, its step in the history says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lcprune.errors import InputError
from lcprune.merging.operators import Operator
from lcprune.merging.planners import Planner
from lcprune.merging.refit import Refit


@dataclass(frozen=True)
class Stage:
    """A stretch of the way down with a method of its own."""

    until_depth: int
    """The last depth that is merged down to in this way."""
    planner: Planner | None = None
    """Which layers merge; null = that of the run."""
    operator: Operator | None = None
    """What becomes of their weights; null = that of the run."""
    refit: Refit | None = None
    """How the merged student is repaired; null = that of the run."""


@dataclass(frozen=True)
class Method:
    """What a merge is made with."""

    planner: Planner
    """Which layers merge."""
    operator: Operator
    """What becomes of their weights."""
    refit: Refit | None
    """How the merged student is repaired; None = not at all."""


def method(stages: Sequence[Stage], usual: Method, target: int) -> Method:
    """What a merge down to a depth is made with.

    Args:
        stages: From the deepest on.
        usual: The run's own.
        target: Layers after the merge.
    """
    stage = next((stage for stage in stages if stage.until_depth <= target), None)
    if stage is None:
        return usual
    return Method(stage.planner or usual.planner, stage.operator or usual.operator, stage.refit or usual.refit)


def check_order(stages: Sequence[Stage]) -> None:
    """Raises InputError for stages that are out of order."""
    ends = [stage.until_depth for stage in stages]
    if ends != sorted(set(ends), reverse=True):
        raise InputError(f"collapse.stages: until_depth={ends} must fall from stage to stage.")


def check(stages: Sequence[Stage], depths: Sequence[int]) -> None:
    """Raises InputError for stages that are out of order, or that no merge is made in.

    Args:
        stages: Of a run.
        depths: That its schedule merges down to.
    """
    check_order(stages)
    ends = [stage.until_depth for stage in stages]
    above = float("inf")
    for end in ends:
        if not any(end <= depth < above for depth in depths):
            raise InputError(
                f"collapse.stages: no merge is made in the stage until_depth={end}, the schedule merges down to "
                f"{', '.join(map(str, depths))}: name one of these depths, or leave the stage out."
            )
        above = end
