"""When layers merge, by something else than the optimizer step. Standard library only.

    ByTokens        a schedule whose steps are read as tokens: as much text before every merge, whatever the batch
    WhenRecovered   as soon as the student has got over the merge before, at the latest at the steps of a schedule

        merge       validation                                      merge
          v     v      v      v                                       v
    ------+-----o------o------o--                    ...       -------+------
      before=12.0     13.1   12.5 <= 1.05 * 12.0: recovered           at the latest

What they look at is measured on all ranks together and part of the checkpoint: ranks agree, and a run that resumes
decides as it would have decided.
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from lcprune.distillation.schedules import Deadline, Facts, Milestone, Schedule, StepSchedule
from lcprune.errors import InputError


@dataclass(frozen=True)
class ByTokens(Schedule):
    """Merges after so many tokens, prompts among them, padding not, over all ranks."""

    schedule: StepSchedule
    """A schedule whose numbers of steps are read as numbers of tokens, such as Evenly with last: 2000000."""

    unit: ClassVar[str] = "token"

    def milestones(self, depth: int) -> tuple[Milestone, ...]:
        """Those of the schedule, in tokens."""
        return self.schedule.milestones(depth)

    def deadlines(self, depth: int) -> tuple[Deadline, ...]:
        """Only a merge before the first token has a step that is known."""
        return tuple((0 if tokens == 0 else inf, target) for tokens, target in self.milestones(depth))

    def check_counted(self, step: int, tokens: int) -> None:
        """Raises InputError if a run resumes from a checkpoint that does not say how much was read.

        Args:
            step: Optimizer steps done.
            tokens: Counted so far.
        """
        if step > 0 and tokens == 0:
            raise InputError(
                "ckpt_path names a checkpoint that has counted no tokens, which ByTokens goes by: resume with a "
                "schedule by steps (Evenly, AtSteps), or begin anew."
            )

    def position(self, facts: Facts) -> int:
        """Tokens at which it was last asked, and one."""
        return facts.tokens_before + 1

    def reached(self, facts: Facts) -> int | None:
        """The last milestone among the tokens of the last step."""
        passed = [
            target for tokens, target in self.milestones(facts.begun) if facts.tokens_before < tokens <= facts.tokens
        ]
        return passed[-1] if passed else None


@dataclass(frozen=True)
class WhenRecovered(Schedule):
    """Merges as soon as the student has recovered from the merge before, and at a deadline even if it has not.

    The first merge, which nothing went before, happens at its deadline. While a phase before the last one is on,
    nothing is recovered from.
    """

    latest: StepSchedule
    """Down to which depths, and the optimizer step by which each is reached even without recovery."""
    within: float | None = 0.05
    """Recovered when validation perplexity is at most (1 + within) times that right before the merge; null = not so."""
    patience: int | None = None
    """Recovered, too, when so many validations in a row have brought no gain; null = not so."""
    min_gain: float = 0.01
    """Fraction by which validation perplexity must fall below the best since the merge to count as a gain."""

    by_validation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        wrong = []
        if self.within is None and self.patience is None:
            wrong.append("within=null and patience=null leave nothing to recover by: give one of them")
        if self.within is not None and not 0 <= self.within < inf:
            wrong.append(f"within={self.within} must be a fraction of 0 or more, such as 0.05")
        if self.patience is not None and self.patience < 1:
            wrong.append(f"patience={self.patience} must be 1 or more validations")
        if not 0 <= self.min_gain < 1:
            wrong.append(f"min_gain={self.min_gain} must lie in [0, 1)")
        if wrong:
            raise InputError(f"WhenRecovered: {'; '.join(wrong)}.")

    def milestones(self, depth: int) -> tuple[Milestone, ...]:
        """The deadlines."""
        return self.latest.milestones(depth)

    def due(self, facts: Facts) -> int | None:
        """At a deadline what it asks for, otherwise the next portion once the student has recovered."""
        scheduled = super().due(facts)
        if scheduled is not None or not facts.merged:
            return scheduled
        return self.portion(facts) if self.recovered(facts) else None

    def recovered(self, facts: Facts) -> bool:
        """Whether the last validation is back where the one before the merge was, or validations stagnate."""
        if not facts.since:
            return False
        back = self.within is not None and facts.before is not None
        if back and facts.since[-1] <= (1 + (self.within or 0)) * (facts.before or 0):
            return True
        return self.patience is not None and _without_gain(facts.since, self.min_gain) >= self.patience


def _without_gain(values: tuple[float, ...], min_gain: float) -> int:
    """How many of the last values in a row have not fallen below the best before them by that fraction."""
    best, count = values[0], 0
    for value in values[1:]:
        count = 0 if value < (1 - min_gain) * best else count + 1
        best = value if count == 0 else best
    return count
