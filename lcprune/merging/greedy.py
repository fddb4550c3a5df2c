"""One merge after the other, each time the one that costs least on text (SLEB, arXiv:2402.09025, Algorithm 1).

    repeat until the target depth:
        for every candidate:  loss of the model with that merge          layers below the merge are not run again
        keep the candidate with the least loss

SLEB takes whole layers out: with `Drop` every layer is a candidate, merged into the layer before it (the first one
into the second). Every other operator merges neighbours (l, l + 1). A search of n merges in L layers tries about
n * L candidates at half a forward pass and a head each; `candidates` lets a cheap criterion choose which are tried.
Memory: what `prefixes_of` keeps of the calibration text's stream, and one merged layer per merge.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf, isnan

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.activity import Measure
from lcprune.merging.calibration import Calibration
from lcprune.merging.checks import check_kind
from lcprune.merging.criteria import BlockInfluence, Criterion, TrialPerplexity, ranking, scores_of
from lcprune.merging.lineage import MergeStep
from lcprune.merging.operators import Drop, Operator
from lcprune.merging.planners import StepwisePlanner, built_alike, new_step, proportional, uniform
from lcprune.merging.prefix import PrefixCache, prefixes_of
from lcprune.merging.progress import track
from lcprune.merging.remeasure import measure_activity


@dataclass(frozen=True)
class GreedyPlanner(StepwisePlanner):
    """Tries every candidate, keeps the one with the least calibration loss, and begins again (SLEB)."""

    candidates: int | None = None
    """How many candidates are tried for every merge, the safest by `criterion`; null = all, as published."""
    criterion: Criterion = BlockInfluence()  # noqa: RUF009 - frozen
    """What chooses the candidates, asked again before every merge; for `Concat` also the shares of the members."""

    def __post_init__(self) -> None:
        check_kind("criterion", self.criterion, Criterion, "lcprune.BlockInfluence()")
        if self.candidates is not None and self.candidates < 1:
            raise InputError(
                f"candidates={self.candidates} of GreedyPlanner must be at least 1, or null to try every merge."
            )

    def steps(self, calibration: Calibration, operator: Operator, target: int) -> Generator[MergeStep, None, None]:
        """The best merge of every stage; ends early where no two neighbours are built alike."""
        model = calibration.model
        original = calibration.original if calibration.original is not None else surgery.second_view(model)
        history = calibration.past
        prefixes = prefixes_of(calibration, calibration.depth - 1)
        with ExitStack() as accepted:
            while calibration.depth > target:
                now = replace(calibration, original=original, history=history, _stats={}, _scores={})
                measure = _activity_of(now) if operator.needs_activity else None
                best = self._best(now, prefixes, operator, measure)
                if best is None:
                    return
                if measure is not None:
                    calibration.known.note(history.steps, best.group, measure(best.group))
                accepted.enter_context(surgery.trial(model, best, measure=measure))
                prefixes.refresh(best.base)
                history = history.append(best)
                yield best

    def _best(
        self, calibration: Calibration, prefixes: PrefixCache, operator: Operator, measure: Measure | None
    ) -> MergeStep | None:
        """The candidate with the least loss, the lowest among equals; None if there is none."""
        judge, depth = TrialPerplexity(), calibration.depth
        # The lower the merge, the more layers run: from both ends by turns, so that an estimate of the time left holds.
        candidates = self._candidates(calibration, operator)
        candidates.sort(key=lambda one: min(one.first_changed, depth - one.first_changed))
        tried = []
        for candidate in track(candidates, f"trying merges of {depth} layers"):
            with surgery.trial(calibration.model, candidate.step, measure=measure):
                value = judge.measure(calibration, prefixes.run(candidate.first_changed))
            tried.append((inf if isnan(value) else value, candidate.going, candidate.step))
        if not tried:
            return None
        value, _, step = min(tried, key=lambda one: one[:2])
        return replace(step, scores={"TrialPerplexity": value})

    def _candidates(self, calibration: Calibration, operator: Operator) -> list["_Candidate"]:
        """Every candidate, or only the safest by the criterion where there are more than wanted."""
        pairs = built_alike(calibration)
        candidates = _removals(pairs, operator) if isinstance(operator, Drop) else _pairs(pairs, operator)
        fewer = self.candidates is not None and self.candidates < len(candidates)
        if not fewer and not operator.needs_activity:
            return candidates
        scores = scores_of(self.criterion, calibration)
        if len(scores) != calibration.depth:
            raise InputError(
                f"criterion={self.criterion} scores spans of layers, not layers: GreedyPlanner takes one that gives "
                "every layer a score, AngularDistance with span=1."
            )
        if operator.needs_activity:
            candidates = [candidate.sharing_by(scores) for candidate in candidates]
        safest = ranking(scores)
        return sorted(candidates, key=lambda one: min(safest.index(layer) for layer in one.going))[: self.candidates]


@dataclass(frozen=True)
class _Candidate:
    """A merge to try."""

    step: MergeStep
    going: tuple[int, ...]
    """Layers that do not live on as they are: one with `Drop`, both with other operators."""
    first_changed: int
    """The first layer of the merged model that computes something else than before, or gets another input."""

    def sharing_by(self, scores: Sequence[float]) -> "_Candidate":
        """The same with shares in proportion to the scores."""
        members = [scores[layer] for layer in self.step.group]
        shares = tuple(proportional(members, members.index(max(members))))
        return replace(self, step=replace(self.step, shares=shares))


def _removals(pairs: Sequence[tuple[int, int]], operator: Drop) -> list[_Candidate]:
    """One candidate per layer that can go: into the layer before it, or behind it where none before is built alike."""
    uppers = {upper for _, upper in pairs}
    found = []
    for lower, upper in pairs:
        if operator.keep != "last":
            found.append(_Candidate(new_step((lower, upper), operator, (1.0, 0.0)), (upper,), upper))
        if operator.keep == "last" or (operator.keep == "strongest" and lower not in uppers):
            found.append(_Candidate(new_step((lower, upper), operator, (0.0, 1.0)), (lower,), lower))
    return found


def _pairs(pairs: Sequence[tuple[int, int]], operator: Operator) -> list[_Candidate]:
    """One candidate per pair of neighbours, in equal shares."""
    return [_Candidate(new_step(pair, operator, uniform(pair)), pair, pair[0]) for pair in pairs]


def _activity_of(calibration: Calibration) -> Measure:
    """The activity of the model as it stands, measured once for all candidates of a stage."""
    everything = measure_activity(calibration.model, calibration.batches, range(calibration.depth))
    return lambda wanted: [everything[index] for index in wanted]
