"""The two neighbours that turn the stream least merge, everything is scored afresh, and so on (CoMe, arXiv:2510.15304).

    repeat until the target depth:
        score of the pair (l, l+1)      E(arccos(cos(h_l, h_{l+2})) / pi)          h_b = the stream before layer b
        the pair with the least score merges, shared between its members
            by influence                r_l = BI_l^p / sum BI^p,  BI_l = E(1 - cos(h_l, h_{l+1}))
            or searched (CoMe-P)        of the shares 0, 1/20 .. 1 the one with the least calibration loss

All of it comes from walks of the text along the layers: scores, influences, and for `Concat` what the members' heads
and channels do. What keeps the walks short:

    trail       a merge at layer b changes nothing before it: the next walk begins there (`Trail`), and the scores of
                pairs below stay
    glance      a part of the text walks to the end; the rest only as far as a pair that may yet be the least. Clearly
                worse are those whose tokens say so by 8 standard errors of the difference between two pairs

Memory: the text's stream before every fourth layer and a few more, and one merged layer per merge. Legend: `N` tokens
that count, `B` batch, `T` tokens, `D` hidden.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import inf, isfinite, isnan, sqrt
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.activity import Activity
from lcprune.merging.calibration import Batch, Calibration, last_tokens, mask_of, tokens_in, unmasked
from lcprune.merging.criteria import AngularDistance, TrialPerplexity
from lcprune.merging.lineage import Lineage, MergeStep
from lcprune.merging.operators import Operator
from lcprune.merging.planners import StepwisePlanner, built_alike, new_step, uniform
from lcprune.merging.progress import track
from lcprune.merging.remeasure import Trail
from lcprune.merging.streams import one_by_one

Pair = tuple[int, int]
"""Two neighbours, l and l + 1."""

GRID, POWER = 20, 1.0
"""The published settings."""
CLEARLY_WORSE = 8
"""Standard errors, as if tokens were independent; as they are not, about 4 true ones."""
ENOUGH_TO_JUDGE = 32
"""Tokens below which their spread says nothing: with `tokens="last"` a glance holds one of every sequence."""


@dataclass(frozen=True)
class ProgressivePlanner(StepwisePlanner):
    """Merges the pair of neighbours with the least score, scores the merged model afresh, and begins again (CoMe)."""

    criterion: AngularDistance = AngularDistance(span=2)  # noqa: RUF009 - frozen
    """The score of a pair, always over both layers: span 2; its `tokens` say which tokens it looks at."""
    merged: Literal["again", "spared"] = "again"
    """What becomes of a layer that is a merge already: it may merge `again`, or is `spared`."""
    shares: Literal["influence", "searched"] = "influence"
    """Shares of the members: in proportion to their block `influence`, or `searched` by calibration loss (CoMe-P)."""
    power: float = POWER
    """p: the power of the influences; 0 = equal shares, large = nearly all to the more influential member."""
    grid: int = GRID
    """In how many steps the search goes through the shares 0 to 1; every different outcome costs a partial pass."""
    glance: int | None = 2048
    """Tokens on which all pairs are scored; on the others only pairs that may be the least. Null = all pairs on all."""

    def __post_init__(self) -> None:
        wrong = []
        if self.criterion.span != 2:
            wrong.append(f"criterion={self.criterion} must have span=2, it is the score of two layers")
        if self.merged not in ("again", "spared"):
            wrong.append(f"merged={self.merged!r} must be again or spared")
        if self.shares not in ("influence", "searched"):
            wrong.append(f"shares={self.shares!r} must be influence or searched")
        if not (self.power >= 0 and isfinite(self.power)):
            wrong.append(f"power={self.power} must be a number from 0 on")
        if self.grid < 1:
            wrong.append(f"grid={self.grid} must be at least 1")
        if self.glance is not None and self.glance < 1:
            wrong.append(f"glance={self.glance} must be at least 1, or null to score every pair on all tokens")
        if self.shares == "searched" and self.power != POWER:
            wrong.append(f"power={self.power} has no effect on searched shares: leave it out, or set shares=influence")
        if self.shares == "influence" and self.grid != GRID:
            wrong.append(f"grid={self.grid} has no effect on shares by influence: leave it out, or set shares=searched")
        if wrong:
            raise InputError(f"ProgressivePlanner: {'; '.join(wrong)}.")

    def check(self, depth: int, target: int) -> None:
        """Layers that merge once at most can at best halve the depth."""
        fewest = depth - depth // 2
        if self.merged == "spared" and target < fewest:
            raise InputError(
                f"ProgressivePlanner: merged=spared lets a layer merge once and leaves at least {fewest} of {depth} "
                f"layers, target_depth={target} asks for fewer: set merged=again or raise target_depth."
            )

    def steps(self, calibration: Calibration, operator: Operator, target: int) -> Generator[MergeStep, None, None]:
        """One pair after the other; ends early where no two neighbours are left that may merge."""
        history = calibration.past
        view = _View(calibration, self, recorded=operator.needs_activity)
        if calibration.depth > target:
            calibration.check_stream(view.glance(calibration.depth))
        with ExitStack() as accepted:
            while calibration.depth > target and (pairs := self._allowed(built_alike(calibration), history.lineage)):
                step = self._shared(calibration, view, view.least(pairs, calibration.depth), operator)
                if operator.needs_activity:
                    calibration.known.note(history.steps, step.group, view.activity(step.group))
                accepted.enter_context(surgery.trial(calibration.model, step, measure=view.activity))
                view.forget(step.base)
                history = history.append(step)
                yield step

    def _allowed(self, pairs: Sequence[Pair], lineage: Lineage) -> Sequence[Pair]:
        """Those of the pairs that may merge."""
        if self.merged == "again":
            return pairs
        return [pair for pair in pairs if all(len(lineage[layer]) == 1 for layer in pair)]

    def _shared(self, calibration: Calibration, view: "_View", pair: Pair, operator: Operator) -> MergeStep:
        """The merge of this pair, with the shares of its members and what they were found by."""
        scores = {"AngularDistance": view.score(pair)}
        if self.shares == "influence":
            return new_step(pair, operator, shares_of([view.influence(layer) for layer in pair], self.power), scores)
        share, value = self._searched(calibration, view, pair, operator)
        return new_step(pair, operator, (share, 1 - share), {**scores, "TrialPerplexity": value})

    def _searched(self, calibration: Calibration, view: "_View", pair: Pair, operator: Operator) -> tuple[float, float]:
        """The first member's share with the least perplexity, the most even among equals, and that perplexity.

        Shares that make the same layer (for `Concat` the same numbers of heads and channels) are run once.
        """
        judge, before = replace(calibration, batches=view.batches), view.before(pair[0])
        values: dict[bytes, float] = {}
        found = []
        parts = sorted(range(self.grid + 1), key=lambda part: abs(2 * part - self.grid))
        for part in track(parts, f"sharing layers {pair[0]} and {pair[1]}"):
            share = part / self.grid
            step = new_step(pair, operator, (share, 1 - share))
            with surgery.trial(calibration.model, step, measure=view.activity):
                outcome = _fingerprint(calibration, pair[0])
                if outcome not in values:
                    value = TrialPerplexity().measure(judge, view.last_states(pair[0], before))
                    values[outcome] = inf if isnan(value) else value
                    found.append((share, values[outcome]))
        return min(found, key=lambda one: one[1])


def shares_of(influences: Sequence[float], power: float) -> list[float]:
    """Shares in proportion to influences ** power; equal ones where no member has any, or one is no number.

    Example:
        >>> shares_of([0.1, 0.3], 1.0)
        [0.25, 0.75]
    """
    largest = max(influences)
    if not all(map(isfinite, influences)) or largest <= 0:
        return uniform(influences)
    # Relative to the largest, or a large power would make every one of them 0.
    powers = [(max(0.0, influence) / largest) ** power for influence in influences]
    return [one / sum(powers) for one in powers]


def _fingerprint(calibration: Calibration, index: int) -> bytes:
    """What a layer computes with: equal for two trials that make the same layer."""
    digest = blake2b(repr(calibration.layout.kind_of(calibration.model.config, index)).encode())
    for theta in calibration.layer_tensors(index).values():
        digest.update(theta.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


class _View:
    """Scores of pairs, influences and activity in the model as it stands: looked at again only behind a merge."""

    def __init__(self, calibration: Calibration, planner: ProgressivePlanner, *, recorded: bool) -> None:
        texts = _glance_and_rest(calibration.batches, planner.glance)
        trails = [Trail(calibration.model, text, recorded=recorded) for text in texts]
        self._parts = [_Part(trail, planner.criterion.tokens) for trail in trails]
        self.batches = [batch for trail in trails for batch in trail.batches]
        """All of the text, in the order in which states are handed out."""

    def glance(self, depth: int) -> list[float]:
        """The score of every pair on the first part of the text."""
        self._parts[0].walk(depth, f"scoring pairs of {depth} layers")
        return [_mean(angles) for angles in self._parts[0].angles]

    def least(self, pairs: Sequence[Pair], depth: int) -> Pair:
        """The pair with the least score, the lowest among equals."""
        glance, scores = self._parts[0], self.glance(depth)
        rivals = [min(pairs, key=lambda pair: (scores[pair[0]], pair))]
        while rivals:
            for part in self._parts[1:]:
                part.walk(rivals[0][1] + 1, f"scoring layer {rivals[0][0]} on all tokens")
            scored = min(len(part.angles) for part in self._parts)
            best = min((pair for pair in pairs if pair[0] < scored), key=lambda pair: (self.score(pair), pair))
            rivals = [pair for pair in pairs if pair[0] >= scored and glance.may_beat(pair, best)]
        return best

    def score(self, pair: Pair) -> float:
        """The mean angle over a pair, in half turns; infinite where it is no number."""
        return _mean(torch.cat([part.angles[pair[0]] for part in self._parts]))

    def influence(self, layer: int) -> float:
        """1 - the mean cosine between a layer's input and output."""
        return 1 - torch.cat([part.cosines[layer] for part in self._parts]).mean().item()

    def activity(self, wanted: Sequence[int]) -> tuple[Activity, ...]:
        """What layers do, over all of the text."""
        weights = [part.tokens / sum(each.tokens for each in self._parts) for part in self._parts]
        layers = zip(*(part.trail.activity(wanted) for part in self._parts), strict=True)
        return tuple(_average(layer, weights) for layer in layers)

    def before(self, layer: int) -> list[list[Tensor]]:
        """The stream before a layer, for every part of the text one state [B, T, D] a batch."""
        return [states for part in self._parts for _, states in part.trail.walk(layer, layer)]

    def last_states(self, base: int, before: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
        """The last state of every one of `batches`, from the stream before layer `base` on."""
        for part, states in zip(self._parts, before, strict=True):
            yield from part.trail.last_states(base, states)

    def forget(self, base: int) -> None:
        """Says that `base` has become another layer."""
        for part in self._parts:
            part.forget(base)


class _Part:
    """A part of the text, and what was seen of it on its way."""

    def __init__(self, trail: Trail, tokens: Literal["all", "last"]) -> None:
        self.trail = trail
        self.cosines: list[Tensor] = []
        """[N] cosines between every layer's input and output, of all tokens."""
        self.angles: list[Tensor] = []
        """[N] angles in half turns over every pair of layers, of the tokens asked for."""
        self._counted = last_tokens(trail.batches) if tokens == "last" else trail.batches

    @property
    def tokens(self) -> int:
        """Number of unmasked tokens."""
        return sum(map(tokens_in, self.trail.batches))

    def walk(self, stop: int, what: str) -> None:
        """Scores every pair below boundary `stop` that has no score."""
        start = len(self.angles)
        if start + 2 > stop:
            return
        states: dict[int, list[Tensor]] = {}
        for here, now in track(self.trail.walk(start, stop), what, stop + 1 - start):
            states[here] = now
            if here == len(self.cosines) + 1:
                self.cosines.append(_cosines(states[here - 1], now, self.trail.batches))
            if here == len(self.angles) + 2:
                self.angles.append(_cosines(states.pop(here - 2), now, self._counted).arccos() / torch.pi)

    def may_beat(self, pair: Pair, best: Pair) -> bool:
        """Whether this part of the text leaves open that a pair's score is less than the best."""
        difference_N = self.angles[pair[0]] - self.angles[best[0]]
        many = len(difference_N) >= ENOUGH_TO_JUDGE
        error = difference_N.std().item() / sqrt(len(difference_N)) if many else inf
        return isfinite(_mean(self.angles[pair[0]])) and not difference_N.mean().item() > CLEARLY_WORSE * error

    def forget(self, base: int) -> None:
        """Says that `base` has become another layer; the pair before it is the lowest that has changed."""
        self.trail.forget(base)
        del self.cosines[base:], self.angles[max(0, base - 1) :]


def _glance_and_rest(batches: Sequence[Batch], tokens: int | None) -> list[list[Batch]]:
    """Sequences of about so many tokens, spread over the text, and the others; all in one where there are no more."""
    single = one_by_one(batches)
    total = sum(one["input_ids"].numel() for one in single)
    if tokens is None or total <= tokens:
        return [list(batches)]
    wanted = max(1, round(len(single) * tokens / total))
    chosen = {place * len(single) // wanted for place in range(wanted)}
    parts: list[list[Batch]] = [[], []]
    for place, one in enumerate(single):
        parts[place not in chosen].append(one)
    return [part for part in parts if part]


def _cosines(before: Sequence[Tensor], after: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """[N] cosines between the stream at two places, of the tokens that count; in float64."""
    cosines = [
        cosine_similarity(unmasked(before_BTD, mask_BT).float(), unmasked(after_BTD, mask_BT).float(), dim=-1)
        for before_BTD, after_BTD, mask_BT in zip(before, after, map(mask_of, batches), strict=True)
    ]
    return torch.cat(cosines).clamp(-1, 1).cpu().double()


def _mean(values_N: Tensor) -> float:
    value = values_N.mean().item()
    return inf if isnan(value) else value


def _average(parts: Sequence[Activity], weights: Sequence[float]) -> Activity:
    heads = [weight * part.heads_KI for weight, part in zip(weights, parts, strict=True)]
    channels = [weight * part.channels_F for weight, part in zip(weights, parts, strict=True)]
    return Activity(torch.stack(heads).sum(0), torch.stack(channels).sum(0))
