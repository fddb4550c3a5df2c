"""Which layers merge: from a budget to a plan.

    FixedPlan          the groups that the user names
    OneShotRanking     the n lowest-scoring layers go into the layer before them    ShortGPT, arXiv:2403.03853
    ContiguousBlock    the n layers in a row that turn the stream least             Gromov et al., arXiv:2403.17887
    ThresholdPlanner   merges from the top down while the output stays alike        LaCo, arXiv:2402.11187, Algorithm 1

A planner returns MergeSteps, plain data that nothing has happened to yet: print it, edit it, execute it. It may try
merges out on the model and always gives it back bit for bit. A layer that "goes" is merged into the layer before
it, so that the lineage says which teacher state the survivor has to reach; with `Drop` the survivor's weights stay.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import isfinite, isnan
from typing import ClassVar

from torch.nn.functional import cosine_similarity

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.activity import Activity
from lcprune.merging.architectures import LayerLayout
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.checks import check_kind
from lcprune.merging.criteria import BlockInfluence, Criterion, OutputSimilarity, ranking, scores_of
from lcprune.merging.lineage import Lineage, MergeStep, whole_numbers
from lcprune.merging.operators import Operator, spec_of
from lcprune.merging.prefix import prefixes_of
from lcprune.merging.progress import track
from lcprune.merging.remeasure import measure_activity


class Planner(ABC):
    """From a model and a target depth to merge steps. Subclasses are frozen dataclasses with a `plan` method."""

    nested: ClassVar[bool] = False
    """Whether a plan to fewer layers begins with the plan to more, so that one can be cut from the other."""

    def check(self, depth: int, target: int) -> None:
        """Raises InputError for what can be known to fail from the depths alone, before weights are loaded."""

    def check_family(self, layout: LayerLayout) -> None:
        """Raises InputError for a family that this planner cannot serve, before weights are loaded."""

    def check_text(self, batches: Sequence[Batch]) -> None:
        """Raises InputError for calibration text that this planner can do nothing with."""

    @abstractmethod
    def plan(self, calibration: Calibration, operator: Operator, target: int) -> tuple[MergeStep, ...]:
        """The steps that take the model from its depth to `target` layers, or as near as the method allows.

        Args:
            calibration: The model as it stands, left as it is, and the text to judge by.
            operator: How a group will be merged.
            target: Number of layers wanted.
        """

    def foresee(self, lineage: Lineage, target: int) -> Lineage | None:
        """What `plan` will lead to, where that is known without a model; None = it is not.

        Args:
            lineage: As the model stands.
            target: Number of layers wanted.
        """
        return None


class StepwisePlanner(Planner):
    """Finds one merge after the other, each on the model as the merges before it have left it."""

    nested: ClassVar[bool] = True

    @abstractmethod
    def steps(self, calibration: Calibration, operator: Operator, target: int) -> Generator[MergeStep, None, None]:
        """The steps as they are found, arguments as for `plan`.

        Whenever it has handed out a step, the model has all steps so far, for whoever wants to measure it; the model
        is as it was once the generator is exhausted or closed.
        """

    def plan(self, calibration: Calibration, operator: Operator, target: int) -> tuple[MergeStep, ...]:
        """All steps down to the target."""
        with closing(self.steps(calibration, operator, target)) as found:
            steps = list(found)
        return with_weight_cosines(calibration, steps)


@dataclass(frozen=True)
class FixedPlan(Planner):
    """The groups that the user names, in the order named, for as long as the target depth is not passed."""

    groups: list[list[int]]
    """Runs of consecutive layers of the *teacher*, disjoint, e.g. [[24, 25], [12, 13, 14]]."""

    def __post_init__(self) -> None:
        if isinstance(self.groups, str) or not isinstance(self.groups, Iterable):
            raise InputError(f"groups={self.groups!r} must be a list of groups, such as [[24, 25], [12, 13, 14]].")
        object.__setattr__(self, "groups", [list(whole_numbers("groups", group)) for group in self.groups])
        flat = [layer for group in self.groups for layer in group]
        for group in self.groups:
            if len(group) < 2 or group != list(range(group[0], group[0] + len(group))) or group[0] < 0:
                raise InputError(f"groups: {group} must be two or more consecutive layer numbers like [12, 13, 14].")
        if not self.groups or len(flat) != len(set(flat)):
            raise InputError(f"groups={self.groups} must name at least one group and no layer twice.")

    def check(self, depth: int, target: int) -> None:
        """The named layers exist and are enough for the target."""
        highest = max(group[-1] for group in self.groups)
        if highest >= depth:
            raise InputError(f"groups: layer {highest} does not exist, the model has layers 0 to {depth - 1}.")
        reached = depth - sum(len(group) - 1 for group in self.groups)
        if reached > target:
            raise InputError(
                f"groups={self.groups} leave {reached} layers, more than the target depth {target}: "
                "name more groups or raise target_depth."
            )

    def plan(self, calibration: Calibration, operator: Operator, target: int) -> tuple[MergeStep, ...]:
        """Groups not merged yet, renumbered as the layers stand when each is merged."""
        steps = [new_step(places, operator, uniform(places)) for places, _ in self._merges(calibration.lineage, target)]
        return with_weight_cosines(calibration, steps)

    def foresee(self, lineage: Lineage, target: int) -> Lineage:
        """The groups are named, so all is known."""
        return next((after for _, after in reversed(self._merges(lineage, target))), lineage)

    def _merges(self, lineage: Lineage, target: int) -> list[tuple[list[int], Lineage]]:
        """Which places become one, and the lineage behind it, merge by merge."""
        merges = []
        for group in self.groups:
            places = [index for index, members in enumerate(lineage) if set(members) & set(group)]
            if len(places) < 2 or len(lineage) - len(places) + 1 < target:
                continue
            merged = tuple(member for index in places for member in lineage[index])
            lineage = (*lineage[: places[0]], merged, *lineage[places[-1] + 1 :])
            merges.append((places, lineage))
        return merges


@dataclass(frozen=True)
class OneShotRanking(Planner):
    """The n lowest-scoring layers, all judged at once, merge into the layer before them (ShortGPT)."""

    criterion: Criterion = BlockInfluence()  # noqa: RUF009 - frozen
    """What scores the layers; shares within a group are in proportion to it, so that `Drop` keeps the survivor."""
    spare_first: int = 0
    """Number of layers next to the embeddings that stay, whatever their scores."""
    spare_last: int = 0
    """Number of layers next to the head that stay, whatever their scores."""

    def __post_init__(self) -> None:
        check_kind("criterion", self.criterion, Criterion, "lcprune.BlockInfluence()")
        if self.spare_first < 0 or self.spare_last < 0:
            raise InputError(
                f"OneShotRanking: spare_first={self.spare_first} and spare_last={self.spare_last} must be 0 or more."
            )

    def check(self, depth: int, target: int) -> None:
        """The layers that are spared leave enough others."""
        spared = self.spare_first + self.spare_last
        if target < min(spared, depth):
            raise InputError(
                f"OneShotRanking: spare_first={self.spare_first} and spare_last={self.spare_last} keep "
                f"{min(spared, depth)} of {depth} layers, target_depth={target} asks for fewer: spare fewer layers or "
                "raise target_depth."
            )

    def plan(self, calibration: Calibration, operator: Operator, target: int) -> tuple[MergeStep, ...]:
        """One step per run of going layers with the layer before it (after it, when layer 0 goes)."""
        scores = calibration.scores(repr(self.criterion), partial(scores_of, self.criterion))
        if len(scores) != calibration.depth:
            raise InputError(
                f"criterion={self.criterion} scores spans of layers, not layers: OneShotRanking takes one that gives "
                "every layer a score, AngularDistance with span=1; for a span use ContiguousBlock."
            )
        free = range(self.spare_first, calibration.depth - self.spare_last)
        safest = [layer for layer in ranking(scores) if layer in free]
        going = set(safest[: max(0, calibration.depth - target)])
        if unknown := sorted(layer for layer in going if isnan(scores[layer])):
            raise InputError(
                f"criterion={self.criterion} gives layer {unknown[0]} no number (NaN), and target_depth={target} "
                "cannot be reached without the layers that it gives none: let it score every layer (inf = as unsafe as "
                "can be), or raise target_depth."
            )
        name = type(self.criterion).__name__
        steps = []
        for group in reversed(_groups(going, calibration.depth)):
            staying = next((place for place, layer in enumerate(group) if layer not in going), 0)
            shares = proportional([scores[layer] for layer in group], staying)
            worst = {name: max(scores[layer] for layer in group if layer in going)}
            steps.append(new_step(group, operator, shares, worst))
        return with_weight_cosines(calibration, steps)


@dataclass(frozen=True)
class ContiguousBlock(Planner):
    """The n layers in a row with the least angular distance merge into the layer before them (2403.17887).

    As published, with `Drop(keep=first)`: the block goes, the layer before it stays as it is.
    """

    def check(self, depth: int, target: int) -> None:
        """At least the layer before the block stays."""
        if target < 1 or target >= depth:
            raise InputError(f"target_depth={target} must lie between 1 and {depth - 1} for ContiguousBlock.")

    def plan(self, calibration: Calibration, operator: Operator, target: int) -> tuple[MergeStep, ...]:
        """One step of n + 1 members; a block never starts at layer 0, which reads the embeddings."""
        n = calibration.depth - target
        if n < 1:
            return ()
        angles = calibration.stats(n).angle[n]
        start = next(layer for layer in ranking(angles) if layer > 0)
        group = list(range(start - 1, start + n))
        step = new_step(group, operator, uniform(group), {"AngularDistance": angles[start]})
        return with_weight_cosines(calibration, [step])


@dataclass(frozen=True)
class ThresholdPlanner(Planner):
    """LaCo's Algorithm 1: slide down from the top, keep a merge if the output stays similar to the original's.

    LaCo's settings: Llama2-7B C=4, L=1, H=32, I=2, T=0.65; Llama2-13B C=6, 1-40, I=2, T=0.75; Baichuan2-7B C=4,
    1-32, I=2, T=0.70, all with the operator `ReplaceWithLast` that the published code computes.
    """

    layers_per_merge: int = 4
    """C: how many layers become one; fewer where the top is nearer."""
    lowest: int = 1
    """L: the lowest layer that may be a base."""
    highest: int | None = None
    """H: the search starts at base H - C; None, or more than there are = the depth."""
    interval: int = 2
    """I: how far the base moves down after a merge."""
    threshold: float = 0.65
    """T: a merge is kept if the mean cosine of last states to the original's stays above this."""

    def __post_init__(self) -> None:
        wrong = []
        if self.layers_per_merge < 2:
            wrong.append(f"layers_per_merge={self.layers_per_merge} must be at least 2")
        if self.lowest < 0 or (self.highest is not None and self.highest <= self.lowest):
            wrong.append(f"lowest={self.lowest} and highest={self.highest} must satisfy 0 <= lowest < highest")
        if self.interval < 1:
            wrong.append(f"interval={self.interval} must be at least 1")
        if not -1 <= self.threshold <= 1:
            wrong.append(f"threshold={self.threshold} must lie between -1 and 1, it is a cosine")
        if wrong:
            raise InputError(f"ThresholdPlanner: {'; '.join(wrong)}.")

    def check(self, depth: int, target: int) -> None:
        """The range lies inside the model."""
        if self.lowest >= depth - 1:
            raise InputError(
                f"lowest={self.lowest} of ThresholdPlanner leaves no layers to merge in a model of {depth}: it must be "
                f"below {depth - 1}."
            )

    def plan(self, calibration: Calibration, operator: Operator, target: int) -> tuple[MergeStep, ...]:
        """Accepted merges in the order found; fewer than the target asks for if the threshold stops them."""
        depth = calibration.depth
        base = min(self.highest if self.highest is not None else depth, depth) - self.layers_per_merge
        if base < self.lowest:
            return ()
        prefixes = prefixes_of(calibration, base, every=3)  # a layer more per attempt on average, a third of the memory
        calibration.reference  # noqa: B018 - taken now: inside a trial it would be the trial's own
        criterion, steps = OutputSimilarity(), []

        def measure(wanted: Sequence[int]) -> Sequence[Activity]:
            return measure_activity(calibration.model, calibration.batches, wanted)

        with ExitStack() as accepted:
            # Every attempt moves the base down: so many at most.
            for _ in track(range(base - self.lowest + 1), "trying merges"):
                if base < self.lowest or depth <= target:
                    break
                prefixes.forget_from(base + 1)
                absorbed = min(self.layers_per_merge - 1, depth - base - 1, depth - target)
                group = list(range(base, base + absorbed + 1))
                candidate = new_step(group, operator, uniform(group))
                with ExitStack() as attempt:
                    attempt.enter_context(surgery.trial(calibration.model, candidate, measure=measure))
                    similarity = 1 - criterion.measure(calibration, prefixes.run(base))
                    if similarity > self.threshold:
                        accepted.push(attempt.pop_all())
                        steps.append(replace(candidate, scores={"OutputSimilarity": 1 - similarity}))
                        depth -= absorbed
                if similarity > self.threshold:
                    base = min(base - self.interval, depth - self.layers_per_merge)
                else:
                    base -= 1
        return with_weight_cosines(calibration, steps)


def new_step(
    group: Sequence[int], operator: Operator, shares: Sequence[float], scores: dict[str, float] | None = None
) -> MergeStep:
    """A step of this operator over this group."""
    return MergeStep(tuple(group), spec_of(operator), tuple(shares), scores or {})


def built_alike(calibration: Calibration) -> list[tuple[int, int]]:
    """Every pair of neighbours that can become one layer."""
    shapes = [
        {name: theta.shape for name, theta in calibration.layer_tensors(index).items()}
        for index in range(calibration.depth)
    ]
    return [(lower, lower + 1) for lower in range(len(shapes) - 1) if shapes[lower] == shapes[lower + 1]]


def _groups(going: set[int], depth: int) -> list[list[int]]:
    """Runs of going layers, each with the staying layer before it, or after it at the very front; in order."""
    groups: list[list[int]] = []
    for layer in range(depth):
        if layer not in going or not groups:
            groups.append([layer])
        else:
            groups[-1].append(layer)
    if groups[0][0] in going and len(groups) > 1:
        groups[:2] = [groups[0] + groups[1]]
    return [group for group in groups if len(group) > 1]


def uniform(group: Sequence[object]) -> list[float]:
    """The same share for every member."""
    return [1 / len(group)] * len(group)


def proportional(scores: Sequence[float], staying: int) -> list[float]:
    """Shares in proportion to the scores; all of it to the staying member where that would not make it the first.

    A layer that is spared stays although others score higher.
    """
    total = sum(scores)
    others = max(score for place, score in enumerate(scores) if place != staying)
    beaten = others > scores[staying] or (staying > 0 and others == scores[staying])
    if min(scores) < 0 or not isfinite(total) or beaten or total == 0:
        return [float(place == staying) for place in range(len(scores))]
    return [score / total for score in scores]


def with_weight_cosines(calibration: Calibration, steps: Sequence[MergeStep]) -> tuple[MergeStep, ...]:
    """Adds the mean cosine between the weights of neighbours in a group, base to member, to each step's scores.

    Near 0 for most trained models: it says when an elementwise operator is hopeless, and costs nothing.
    """
    origins: list[tuple[int, ...]] = [(index,) for index in range(calibration.depth)]
    noted = []
    for step in steps:
        bases = [calibration.layer_tensors(origins[index][0]) for index in step.group]
        cosines = [
            cosine_similarity(left[name].flatten().float(), right[name].flatten().float(), dim=0).item()
            for left, right in pairwise(bases)
            for name in left
            if left[name].dim() > 1
        ]
        noted.append(replace(step, scores={**step.scores, "weight_cosine": sum(cosines) / len(cosines)}))
        merged = tuple(origin for index in step.group for origin in origins[index])
        origins[step.group[0] : step.group[-1] + 1] = [merged]
    return tuple(noted)
