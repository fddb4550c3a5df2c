"""How safe it is to lose a layer. One sense everywhere: **lower = safer to merge**.

    BlockInfluence     E(1 - cos(h_l, h_{l+1}))                                     ShortGPT, arXiv:2403.03853, eq. 1
    AngularDistance    E(arccos(cos(h_l, h_{l+n})) / pi)                            Gromov et al., arXiv:2403.17887
    OutputSimilarity   1 - mean cosine of the flattened last states, trial against the original
                                                                                    LaCo, arXiv:2402.11187, section 2.3
    TrialPerplexity    exp of the mean next-token loss without the layer            SLEB, arXiv:2402.09025

The first two read one pass of statistics; the last two try every layer out. Averages run over all calibration tokens,
padding left out. Cosines alone are poor judges: look at a loss beside them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import exp, isnan
from typing import Literal

from torch import Tensor, ones_like
from torch.nn.functional import cosine_similarity

from lcprune.errors import InputError
from lcprune.files import said
from lcprune.merging.calibration import Calibration, last_tokens, mask_of, token_loss
from lcprune.merging.prefix import prefixes_of
from lcprune.merging.progress import track

SAFEST = 5
"""How many layers a table or a picture of scores marks."""


class Criterion(ABC):
    """Scores every layer of a model; subclasses are frozen dataclasses with a `score` method."""

    @abstractmethod
    def score(self, calibration: Calibration) -> tuple[float, ...]:
        """One score per layer, in order; lower = safer to merge."""


@dataclass(frozen=True)
class BlockInfluence(Criterion):
    """How much a layer turns the residual stream: mean of 1 - cos(input, output) (ShortGPT)."""

    def score(self, calibration: Calibration) -> tuple[float, ...]:
        """1 - mean cosine over all tokens."""
        return tuple(1 - cosine for cosine in calibration.stats(1).cosine[1])


@dataclass(frozen=True)
class AngularDistance(Criterion):
    """Mean angle between the stream before layer l and after layer l + span - 1, in half turns (2403.17887)."""

    span: int = 1
    """Number of layers between the two states; entry l of the scores is about layers l .. l + span - 1."""
    tokens: Literal["all", "last"] = "all"
    """Which tokens are averaged over: `all` unmasked ones, or the `last` of every sequence, as published by both."""

    def __post_init__(self) -> None:
        wrong = []
        if self.span < 1:
            wrong.append(f"span={self.span} of AngularDistance must be at least 1")
        if self.tokens not in ("all", "last"):
            wrong.append(f"tokens={self.tokens!r} of AngularDistance must be all or last")
        if wrong:
            raise InputError(f"{'; '.join(wrong)}.")

    def __repr__(self) -> str:
        """The tokens only where they are not the default: the name is a column's title."""
        tokens = "" if self.tokens == "all" else f", tokens={self.tokens!r}"
        return f"AngularDistance(span={self.span}{tokens})"

    def score(self, calibration: Calibration) -> tuple[float, ...]:
        """Mean of arccos(cos) / pi over the tokens; `span - 1` fewer entries than layers."""
        if self.tokens == "last":
            calibration = replace(calibration, batches=last_tokens(calibration.batches), _stats={}, _scores={})
        return calibration.stats(self.span).angle[self.span]


class TrialCriterion(Criterion):
    """Judges a whole model by its last states, and a layer by the model without it."""

    @abstractmethod
    def measure(self, calibration: Calibration, states: Iterable[Tensor]) -> float:
        """The figure for a candidate.

        Args:
            calibration: Text and original model.
            states: The candidate's last states [B, T, D] after the final norm, batch by batch.
        """

    def score(self, calibration: Calibration) -> tuple[float, ...]:
        """The figure of the model without each layer in turn; earlier layers are not run again."""
        return sweep((self,), calibration)[0]


def score_all(criteria: Sequence[Criterion], calibration: Calibration) -> tuple[tuple[float, ...], ...]:
    """The scores of every criterion, as if each were asked alone; those that try layers out share the trials."""
    trials = [criterion for criterion in criteria if isinstance(criterion, TrialCriterion)]
    tried = iter(sweep(trials, calibration) if trials else ())
    return tuple(
        next(tried) if isinstance(criterion, TrialCriterion) else scores_of(criterion, calibration)
        for criterion in criteria
    )


def scores_of(criterion: Criterion, calibration: Calibration) -> tuple[float, ...]:
    """What a criterion gives, as plain floats; raises InputError if that is no sequence of numbers."""
    given = criterion.score(calibration)
    try:
        return tuple(float(score) for score in given)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: a tensor of several numbers
        raise InputError(
            f"criterion={criterion} gives {said(given)}, which is not one number for every layer: let its score() "
            "return a tuple of floats."
        ) from error


def sweep(criteria: Sequence[TrialCriterion], calibration: Calibration) -> tuple[tuple[float, ...], ...]:
    """Per criterion the figure of the model without each layer in turn; every candidate is run once for all of them.

    Memory: what `prefixes_of` keeps, and one candidate's last states.
    """
    depth = calibration.depth
    prefixes = prefixes_of(calibration, depth - 1)
    figures: dict[int, list[float]] = {}
    # The lower the layer, the more layers run: from both ends by turns, so that an estimate of the time left holds.
    from_both_ends = sorted(range(depth), key=lambda layer: min(layer, depth - 1 - layer))
    for layer in track(from_both_ends, "trying the model without each layer"):
        states = tuple(prefixes.run(layer + 1, entry=layer))
        figures[layer] = [criterion.measure(calibration, states) for criterion in criteria]
    return tuple(zip(*(figures[layer] for layer in range(depth)), strict=True))


@dataclass(frozen=True)
class OutputSimilarity(TrialCriterion):
    """1 - cosine between the candidate's and the original's last states, flattened per sequence (LaCo)."""

    def measure(self, calibration: Calibration, states: Iterable[Tensor]) -> float:
        """1 - mean over sequences of the cosine of flattened [T * D] states.

        Padding is left out, and so are sequences of nothing else.
        """
        total, count = 0.0, 0
        for batch, state_BTD, original_BTD in zip(calibration.batches, states, calibration.reference, strict=True):
            mask_BT, original_BTD = mask_of(batch), original_BTD.to(state_BTD.device)
            if mask_BT is not None:
                padding_BT1 = ~mask_BT[..., None].to(state_BTD.device)
                state_BTD, original_BTD = (each.masked_fill(padding_BT1, 0) for each in (state_BTD, original_BTD))
            cos_B = cosine_similarity(state_BTD.flatten(1).float(), original_BTD.flatten(1).float(), dim=-1)
            read_B = ones_like(cos_B) if mask_BT is None else mask_BT.any(-1).to(cos_B)
            total, count = total + (cos_B * read_B).sum().item(), count + int(read_B.sum())
        return 1 - total / max(count, 1)


@dataclass(frozen=True)
class TrialPerplexity(TrialCriterion):
    """Perplexity of the model without the layer, on the calibration text (SLEB)."""

    def measure(self, calibration: Calibration, states: Iterable[Tensor]) -> float:
        """exp(mean cross-entropy of the next token in nats)."""
        total, count = 0.0, 0
        for state_BTD, batch in zip(states, calibration.batches, strict=True):
            loss, tokens = token_loss(calibration.model, state_BTD, batch)
            total, count = total + loss, count + tokens
        return perplexity(total, count)


def perplexity(loss: float, tokens: int) -> float:
    """exp(loss / tokens), infinite instead of an overflow; raises InputError if there are no tokens."""
    if not tokens:
        raise InputError(
            "perplexity: no token of the text is scored (all are padding or labelled -100): give text that is."
        )
    try:
        return exp(loss / tokens)
    except OverflowError:
        return float("inf")


def ranking(scores: Sequence[float]) -> list[int]:
    """Layers from the safest on, the lower first among equals; what is no number comes last."""
    return sorted(range(len(scores)), key=lambda layer: (isnan(scores[layer]), scores[layer], layer))
