"""What the yardstick measures, by name: every planner with every operator and every refit.

    PLANNER-OPERATOR[-REFIT]              bi-drop, come-concat-ridge
    PLANNER.OPERATOR>OPERATOR[-REFIT]     come.concat>drop-ridge: groups chosen for one operator, merged by another

    bi, trial       the layers of least BlockInfluence, or whose loss costs least, all at once
    block           the run of layers that turns the stream least
    laco            Algorithm 1 with two layers a merge, by the highest threshold of LACO that reaches the depth
    greedy(8)       one merge after the other, each the best of all (of 8) by loss
    come(p)         one pair after the other, by the angle it turns; p: shares searched on text
    search          RefitSearch with that operator alone; `search-drop` with either member kept

    come-published, laco-published, best      pairs whose parts belong together: as published, and recipes/best.yaml

Patterns of a shell choose several: 'bi-*', '*-concat-ridge'; methods with `>` only match a pattern that has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product

from lcprune.errors import InputError
from lcprune.merging.concat import Concat
from lcprune.merging.criteria import AngularDistance, BlockInfluence, TrialPerplexity
from lcprune.merging.greedy import GreedyPlanner
from lcprune.merging.operators import Drop, Operator, Rdsc, ReplaceWithLast, WeightedAverage
from lcprune.merging.planners import ContiguousBlock, OneShotRanking, Planner, ThresholdPlanner
from lcprune.merging.progressive import ProgressivePlanner
from lcprune.merging.refit import MagnitudeCompensation, Refit, RidgeRefit
from lcprune.merging.search import RefitSearch

LACO = (0.85, 0.65, 0.45, 0.25)
"""Thresholds that are tried in turn; 0.65 is the published one."""


@dataclass(frozen=True)
class Method:
    """Which layers merge, into what, and how the outcome is repaired."""

    planners: Sequence[Planner]
    """The first of them whose plan reaches a depth counts there."""
    operator: Operator
    """For which the groups are chosen."""
    refit: Refit | None = None
    instead: Operator | None = None
    """What merges the groups in the end; None = the same."""


PLANNERS: dict[str, Sequence[Planner]] = {
    "bi": [OneShotRanking(BlockInfluence())],
    "block": [ContiguousBlock()],
    "trial": [OneShotRanking(TrialPerplexity())],
    "laco": [ThresholdPlanner(layers_per_merge=2, threshold=threshold) for threshold in LACO],
    "greedy": [GreedyPlanner()],
    "greedy8": [GreedyPlanner(candidates=8)],
    "come": [ProgressivePlanner()],
    "comep": [ProgressivePlanner(shares="searched")],
    "search": [RefitSearch()],
}
OPERATORS: dict[str, Operator] = {
    "drop": Drop(),
    "first": Drop(keep="first"),
    "average": WeightedAverage(),
    "last": ReplaceWithLast(),
    "rdsc": Rdsc(),
    "concat": Concat(),
    "joint": Concat(selection="joint"),
}
REFITS: dict[str, Refit | None] = {
    "": None,
    "-magnitude": MagnitudeCompensation(),
    "-mlp": RidgeRefit(layers="merged", projections="mlp"),
    "-merged": RidgeRefit(layers="merged"),
    "-ridge": RidgeRefit(),
}


def _possible(planner: str, operator: str) -> bool:
    """ThresholdPlanner tries merges out without looking at what layers do on text."""
    return not (planner == "laco" and OPERATORS[operator].needs_activity)


CHOICES: dict[str, tuple[Sequence[Planner], Operator]] = {
    f"{planner}-{operator}": (PLANNERS[planner], OPERATORS[operator])
    for planner, operator in product(PLANNERS, OPERATORS)
    if _possible(planner, operator)
} | {
    "search-drop": ([RefitSearch(also=[Drop("last")])], Drop("first")),
    "laco-published": ([ThresholdPlanner()], ReplaceWithLast()),
    "come-published": (
        [ProgressivePlanner(criterion=AngularDistance(span=2, tokens="last"))],
        Concat(norms="mean"),
    ),
}
METHODS: dict[str, Method] = {
    f"{choice}{refit}": Method(*CHOICES[choice], REFITS[refit]) for choice, refit in product(CHOICES, REFITS)
} | {
    "best": Method(
        [RefitSearch(also=[Drop("last"), Concat(selection="joint"), WeightedAverage()])], Drop("first"), RidgeRefit()
    )
}
CROSSED: dict[str, Method] = {
    f"{choice.replace('-', '.', 1)}>{operator}{refit}": Method(*CHOICES[choice], REFITS[refit], OPERATORS[operator])
    for choice, operator, refit in product(CHOICES, OPERATORS, REFITS)
}
DEFAULT = [
    "bi-drop", "block-first", "trial-drop", "bi-average", "bi-last", "bi-rdsc", "bi-concat", "bi-joint",
    "bi-drop-magnitude", "bi-drop-mlp", "bi-drop-merged", "bi-drop-ridge", "bi-average-ridge", "bi-concat-ridge",
    "bi-joint-ridge", "search-first-ridge", "best",
]  # fmt: skip


def named(patterns: Sequence[str]) -> dict[str, Method]:
    """The methods that names and patterns mean, in their order; raises InputError for one that means none."""
    found: dict[str, Method] = {}
    for pattern in patterns:
        methods = CROSSED if ">" in pattern else METHODS
        matching = {name: method for name, method in methods.items() if fnmatchcase(name, pattern)}
        if not matching:
            raise InputError(
                f"method {pattern!r} is none: name PLANNER-OPERATOR[-REFIT] with planners {', '.join(PLANNERS)}, "
                f"operators {', '.join(OPERATORS)}, refits {', '.join(refit[1:] for refit in REFITS if refit)}; "
                "PLANNER.OPERATOR>OPERATOR[-REFIT]; come-published, laco-published or best."
            )
        found |= matching
    return found
