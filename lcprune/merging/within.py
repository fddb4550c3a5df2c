"""The longest plan whose model stays within a multiple of the original's perplexity on the calibration text.

    step by step    follow the planner, measure after every merge, stop before the first that is too much
    otherwise       plan to several depths, try each plan out, and halve the range of depths that are left

Either way the plan found keeps to the budget and the next shorter model was measured and does not; nothing is assumed
about what lies beyond. Plans are measured as they will be executed, inside `surgery.trial` and after their refit.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial

from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import refit as refits
from lcprune.merging import surgery
from lcprune.merging.budget import PerplexityRatio, feasible_depths
from lcprune.merging.calibration import Calibration, evaluating, hidden_states
from lcprune.merging.criteria import TrialPerplexity
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Operator
from lcprune.merging.planners import Planner, StepwisePlanner, with_weight_cosines
from lcprune.merging.progress import track
from lcprune.merging.refit import Refit
from lcprune.merging.remeasure import measure_activity
from lcprune.merging.streams import Stream, regrouped

MEASURED, ORIGINAL = "calibration/perplexity", "calibration/teacher_perplexity"
"""Where the last step's `measured` says what was found: after the plan, and before it."""


def plan_within(
    calibration: Calibration, planner: Planner, operator: Operator, budget: PerplexityRatio, refit: Refit | None = None
) -> tuple[MergeStep, ...]:
    """The longest plan whose model keeps to a perplexity budget; the model is left as it is.

    A planner that goes step by step is followed until the first step too many. Of any other one, plans to several
    depths are tried by bisection: the one found keeps to the budget, the one to a layer fewer does not. With a refit
    every model is judged after it, on the text that it was fitted to: allow for that.

    Args:
        calibration: An unmerged model and the text to judge by.
        planner: Which layers merge.
        operator: What becomes of their weights.
        budget: What is allowed.
        refit: How the merged model will be repaired.

    Returns:
        The steps; the last one's `measured` holds the perplexities.

    Raises:
        InputError: If the mildest plan is over the budget.
    """
    judge = _Judge(calibration, refit)
    limit = judge.original * budget.max_perplexity_ratio
    find = _followed if isinstance(planner, StepwisePlanner) else _bisected
    steps, value, mildest = find(calibration, planner, operator, judge, limit)
    if mildest is not None and not steps:
        raise InputError(
            f"max_perplexity_ratio={budget.max_perplexity_ratio} cannot be kept: the mildest plan of {planner} already "
            f"multiplies the calibration perplexity by {mildest / judge.original:.4g} ({judge.original:.4g} -> "
            f"{mildest:.4g}): allow more, or choose another planner, operator or refit."
        )
    if not steps:
        return ()
    return (*steps[:-1], replace(steps[-1], measured={MEASURED: value, ORIGINAL: judge.original}))


Found = tuple[Sequence[MergeStep], float, float | None]
"""Steps, the perplexity after them, and that of the mildest plan if it was too much."""


def _followed(calibration: Calibration, planner: Planner, operator: Operator, judge: "_Judge", limit: float) -> Found:
    assert isinstance(planner, StepwisePlanner)
    kept: list[MergeStep] = []
    reached, mildest = judge.original, None
    lowest = feasible_depths(planner, calibration.depth)[-1]
    with closing(planner.steps(calibration, operator, lowest)) as steps:
        for step in track(steps, "merging while it is allowed", total=calibration.depth - lowest):
            value = judge.after([*kept, step])
            if not value <= limit:
                mildest = value
                break
            kept.append(step)
            reached = value
    return with_weight_cosines(calibration, kept), reached, mildest


def _bisected(calibration: Calibration, planner: Planner, operator: Operator, judge: "_Judge", limit: float) -> Found:
    depths = feasible_depths(planner, calibration.depth)
    measure = partial(measure_activity, calibration.model, calibration.batches)
    best: Found = ((), judge.original, None)
    kept, refused = -1, len(depths)
    longest: Sequence[MergeStep] = ()
    for _ in track(range(len(depths).bit_length()), "trying depths"):
        if refused - kept < 2:
            break
        place = (kept + refused) // 2
        wanted = calibration.depth - depths[place]
        if not planner.nested or _absorbed(longest) < wanted:
            longest = planner.plan(calibration, operator, depths[place])
        steps = _cut(longest, wanted)
        with surgery.trial(calibration.model, *steps, measure=measure):
            value = judge.after(steps)
        if value <= limit:
            kept, best = place, (steps, value, best[2])
        else:
            refused, best = place, (best[0], best[1], value)
    return best


def _absorbed(steps: Sequence[MergeStep]) -> int:
    return sum(step.absorbed for step in steps)


def _cut(steps: Sequence[MergeStep], layers: int) -> tuple[MergeStep, ...]:
    """The first of the steps, as many as take away no more than so many layers."""
    return tuple(step for number, step in enumerate(steps, 1) if _absorbed(steps[:number]) <= layers)


class _Judge:
    """Measures the perplexity of a model in trial, on the calibration text."""

    def __init__(self, calibration: Calibration, refit: Refit | None) -> None:
        self._calibration, self._refit = calibration, refit
        self._depth = calibration.depth
        self._teacher = surgery.second_view(calibration.model) if refit is not None else None
        self.original = self._perplexity()
        """That of the model before any merge."""
        calibration.check_stream([self.original])

    def after(self, steps: Sequence[MergeStep]) -> float:
        """The perplexity of the model, which has these steps, after its refit; the model is left as it is."""
        if self._refit is None or self._teacher is None or not steps:
            return self._perplexity()
        model, text = self._calibration.model, regrouped(self._calibration.batches, self._calibration.model)
        repaired = replace(steps[-1], refit=refits.spec_of(self._refit))
        with _weights_kept(model):
            history = MergeHistory(self._depth, (*steps[:-1], repaired))
            refits.repair(Stream(model, text), Stream(self._teacher, text), history, MergeHistory(self._depth))
            return self._perplexity()

    def _perplexity(self) -> float:
        return calibration_perplexity(self._calibration)


def calibration_perplexity(calibration: Calibration) -> float:
    """The perplexity of the model as it stands on the calibration text."""
    model, batches = calibration.model, calibration.batches
    with evaluating(model):
        states = (hidden_states(model, batch) for batch in track(batches, "measuring perplexity"))
        return TrialPerplexity().measure(calibration, states)


@contextmanager
def _weights_kept(model: PreTrainedModel) -> Iterator[None]:
    """Puts every Parameter's tensor back afterwards; a refit gives new storage to what it changes."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
