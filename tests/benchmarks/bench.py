"""One model and one text, measured under many methods; what methods have in common is computed once.

    scores           once per criterion
    a plan           once per planner and operator: to the shallowest depth if plans to others can be cut from it
    merged weights   once per plan, whatever refits follow; a nested plan goes on from the shorter one's student
    prefixes         layers below the first change are the dense model's: see `prefix.py`

The figures are those of `lcprune.collapse`, up to rounding (tests/merging/test_yardstick.py).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter

from transformers import PreTrainedModel

from lcprune.merging import surgery
from lcprune.merging.activity import Activity, kv_heads_of, recording
from lcprune.merging.calibration import Batch, Calibration, evaluating, token_loss
from lcprune.merging.collapse import with_refit
from lcprune.merging.criteria import perplexity
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, spec_of
from lcprune.merging.planners import ContiguousBlock, OneShotRanking, Planner, ThresholdPlanner
from lcprune.merging.refit import Refit, repair
from tests.benchmarks.methods import Method
from tests.benchmarks.prefix import Kept, first_changed, layers_of
from tests.benchmarks.results import Result, Results


@dataclass(frozen=True)
class _Merged:
    """A student before any refit."""

    steps: Sequence[MergeStep]
    model: PreTrainedModel
    seconds: float
    """That the merges took."""


class Bench:
    """The model as it is given, which is left unchanged; every student is a view of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Sequence[Batch],
        evaluation: Sequence[Batch],
        depths: Sequence[int],
        results: Results | None = None,
    ) -> None:
        self.model = model
        self.calibration = Calibration(model, calibration)
        self.depth = self.calibration.depth
        self.depths = depths
        self._evaluation = evaluation
        self._results = results if results is not None else Results()
        self._merged: deque[_Merged] = deque(maxlen=2 * len(depths))

    @cached_property
    def _fitting(self) -> Kept:
        return Kept(self.model, self.calibration.batches)

    @cached_property
    def _evaluated(self) -> Kept:
        return Kept(self.model, self._evaluation)

    def perplexity(self, student: PreTrainedModel) -> float:
        """On the evaluation text."""
        loss, count = 0.0, 0
        stream = self._evaluated.stream(student, first_changed(student, self.model))
        with evaluating(student):
            states = stream.last_states(*layers_of(student)[stream.start :])
            for batch, state in zip(self._evaluated.text, states, strict=True):
                batch_loss, tokens = token_loss(student, state, batch)
                loss, count = loss + batch_loss, count + tokens
        return perplexity(loss, count)

    def measure(self, method: Method, depth: int, dense: float) -> Result:
        """The method at a depth; `perplexity` None if its planner stops before."""
        steps, seconds = self._plan(method, depth)
        if not steps:
            return {"perplexity": None}
        if method.instead is not None:
            steps = tuple(replace(step, operator=spec_of(method.instead)) for step in steps)
        merged = self._merge(steps)
        began = perf_counter()
        student = merged.model if method.refit is None else self._refitted(merged, method.refit)
        seconds += merged.seconds + perf_counter() - began
        value = self.perplexity(student)
        groups = [list(ancestors) for ancestors in MergeHistory(self.depth, steps).lineage if len(ancestors) > 1]
        result: Result = {"perplexity": value, "ratio": value / dense, "seconds": round(seconds, 1), "groups": groups}
        planner, operator = method.planners[0], method.instead or method.operator
        if isinstance(planner, OneShotRanking) and operator == Drop():
            scores = self.calibration.scores(repr(planner.criterion), planner.criterion.score)
            result["removed"] = sorted(_dropped(steps), key=scores.__getitem__)
        return result

    def _plan(self, method: Method, depth: int) -> tuple[tuple[MergeStep, ...], float]:
        """Steps to exactly that depth, by the first planner that reaches it, and the seconds spent; none if none."""
        spent = 0.0
        for planner in method.planners:
            # Two layers a merge: one layer less with every step, so that nothing depends on the target.
            nested = planner.nested or (isinstance(planner, ThresholdPlanner) and planner.layers_per_merge == 2)
            steps, seconds = self._planned(planner, method.operator, min(self.depths) if nested else depth)
            spent += seconds
            for number in range(1, len(steps) + 1):
                if MergeHistory(self.depth, steps[:number]).depth == depth:
                    return steps[:number], spent
        return (), spent

    def _planned(self, planner: Planner, operator: Operator, target: int) -> tuple[tuple[MergeStep, ...], float]:
        """The planner's steps towards the target, and the seconds that they took; spent once."""
        if isinstance(planner, OneShotRanking):
            name, score = repr(planner.criterion), planner.criterion.score
            scores, seconds = self._results.timed(f"scores by {name}", lambda: list(score(self._with_spans)))
            self.calibration.scores(name, lambda _: tuple(scores))
            return planner.plan(self.calibration, operator, target), seconds

        def plan() -> dict[str, object]:
            calibration = self._with_spans if isinstance(planner, ContiguousBlock) else self.calibration
            return MergeHistory(self.depth, planner.plan(calibration, operator, target)).to_dict()

        history, seconds = self._results.timed(f"plan to {target} by {planner} for {operator}", plan)
        return MergeHistory.from_dict(history).steps, seconds

    @property
    def _with_spans(self) -> Calibration:
        """The calibration after one pass that serves rankings and blocks of all depths."""
        self.calibration.stats(1, *sorted({self.depth - depth for depth in self.depths} - {1}))
        return self.calibration

    def _merge(self, steps: Sequence[MergeStep]) -> _Merged:
        """The student after these steps, from the longest beginning of them that is at hand."""
        begun = [_Merged((), self.model, 0.0), *(one for one in self._merged if one.steps == steps[: len(one.steps)])]
        known = max(begun, key=lambda one: len(one.steps))
        if len(known.steps) == len(steps):
            return known
        began = perf_counter()
        student = surgery.second_view(known.model)
        for step in steps[len(known.steps) :]:
            surgery.apply(student, step, lambda wanted: self._activity(student, wanted))
        self._merged.append(_Merged(steps, student, known.seconds + perf_counter() - began))
        return self._merged[-1]

    def _activity(self, student: PreTrainedModel, wanted: Sequence[int]) -> Sequence[Activity]:
        """What layers of the student do on the calibration text; only layers from the first changed one are run."""
        layers = layers_of(student)
        stream = self._fitting.stream(student, min(first_changed(student, self.model), *wanted))
        watched = [layers[index] for index in wanted]
        with recording(watched, self.calibration.layout, kv_heads_of(student.config)) as recorder:
            for layer in layers[: max(wanted) + 1]:
                stream.advance(layer)
        return recorder.activities()

    def _refitted(self, merged: _Merged, refit: Refit) -> PreTrainedModel:
        """A student of its own, repaired as `collapse` would repair it."""
        student = surgery.second_view(merged.model)
        history = MergeHistory(self.depth, with_refit(merged.steps, refit))
        first = next(place for place, ancestors in enumerate(history.lineage) if len(ancestors) > 1)
        streams = self._fitting.stream(student, first), self._fitting.stream(self.model, first)
        repair(*streams, history, MergeHistory(self.depth))
        return student


def _dropped(steps: Sequence[MergeStep]) -> list[int]:
    """Layers that `Drop` by the largest share discards; the steps of OneShotRanking go from the back to the front."""
    return [
        layer
        for step in steps
        for layer in step.group
        if layer != step.group[max(range(len(step.group)), key=step.shares.__getitem__)]
    ]
