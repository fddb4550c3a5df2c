"""One run, several objectives: which phase is on at an optimizer step, and how far it has come.

    phases:
      - {objective: [Local], steps: 100, train: merged}       # every merged layer learns alone
      - {objective: [Logits, Boundary], train: all}           # then all together, until the end

A pure function of the step and of when merges happened: a run that resumes has nothing to remember.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lcprune.distillation import levels
from lcprune.distillation.levels import Level, Local
from lcprune.distillation.trained import TRAINED, Trained, trains_adapters
from lcprune.errors import InputError

Begin: TypeAlias = Literal["run", "merge"]
"""From when a run's phases are counted: from its start, or anew from every merge."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with an objective of its own."""

    objective: list[Level]
    """Levels to optimize, each with its weight."""
    steps: int | None = None
    """Optimizer steps that it lasts; null (the last phase only) = until the run ends, or the next merge."""
    train: Trained | None = None
    """Which parameters are trained; null = what model.train says."""

    def __post_init__(self) -> None:
        levels.check(self.objective)
        if self.steps is not None and self.steps < 1:
            raise InputError(f"phases: steps={self.steps} must be 1 or more, or null in the last phase.")
        if self.train is not None and self.train not in TRAINED:
            raise InputError(f"phases: train={self.train!r} must be one of {', '.join(TRAINED)}, or null.")

        if self.train is not None and self._alone and self.train not in ("merged", "lora_merged"):
            raise InputError(
                f"phases: train={self.train!r} beside Local alone, which merged layers learn by and no others: leave "
                "train out, or set merged or lora_merged."
            )

    @property
    def _alone(self) -> bool:
        return all(isinstance(level, Local) for level in self.objective)

    def trained(self, usual: Trained) -> Trained:
        """Which Parameters this phase trains; where every layer learns alone, nothing but the merged ones can."""
        what = usual if self.train is None else self.train
        if self._alone:
            return "lora_merged" if trains_adapters(what) else "merged"
        return what


@dataclass(frozen=True)
class Now:
    """Where in its phases a run stands."""

    phase: Phase
    """The one that is on."""
    progress: float
    """How much of it is over, from 0 to 1; 0 where its length is not known."""


def check(phases: Sequence[Phase]) -> None:
    """Raises InputError unless every phase but the last has a length, and the last has none."""
    if not phases:
        raise InputError("phases=[] must name at least one phase, or leave it out and give an objective.")
    lengths = [phase.steps for phase in phases]
    if None in lengths[:-1] or lengths[-1] is not None:
        raise InputError(
            f"phases: steps={lengths} must be a number in every phase but the last, which goes on until the end: "
            "leave its steps out."
        )


def now(phases: Sequence[Phase], step: int, *, begun: int = 0, end: int | None = None) -> Now:
    """The phase of the optimizer step that comes next.

    Args:
        phases: As `check` accepts.
        step: Optimizer steps done.
        begun: The step at which the first phase began.
        end: The step at which the run, and with it the last phase, ends; None = not known.
    """
    first = begun
    for phase in phases[:-1]:
        assert phase.steps is not None
        if step < first + phase.steps:
            return Now(phase, (step - first) / phase.steps)
        first += phase.steps
    length = 0 if end is None else end - first
    return Now(phases[-1], min(1.0, (step - first) / length) if length > 0 else 0.0)
