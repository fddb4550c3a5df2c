"""What a student can be taught by, as data: a sum of levels, each through the lineage.

    Logits      the teacher's next-token distribution (forward KL, or another divergence)
    Boundary    the teacher's residual stream where the student layer's last ancestor ended: h_last(s)
    Local       the same, of a merged layer alone: given h_{first(s)-1}, reach h_last(s)
    Labels      the text itself (cross-entropy), for the user's own data

The levels together are hierarchical distillation as CoMe describes it (arXiv:2510.15304).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from lcprune.distillation.divergences import KINDS, Divergence, Kind
from lcprune.errors import InputError

LevelT = TypeVar("LevelT", bound="Level")


class Level(ABC):
    """One term of the objective. Subclasses are frozen dataclasses with a `weight`."""

    @property
    @abstractmethod
    def weight(self) -> float:
        """Factor of this term."""


@dataclass(frozen=True)
class Logits(Level):
    """Divergence of the student's next-token distribution from the teacher's."""

    weight: float = 1.0
    """Factor of this term."""
    temperature: float = 1.0
    """Softens both distributions; 1 is best supported for depth-pruned students (Minitron, arXiv:2407.14679)."""
    divergence: Kind = "forward_kl"
    """How the two are compared. Forward KL did best for depth-pruned students: Minitron had 2.155 with it, and 2.665
    with reverse KL."""
    skew: float = 0.1
    """For skew_kl only: a in KL(teacher || a teacher + (1 - a) student) (DistiLLM, arXiv:2402.03898)."""
    beta: float = 0.5
    """For jsd only: the teacher's share of the mixture; 0.5 is the symmetric one (GKD, arXiv:2306.13649)."""

    def __post_init__(self) -> None:
        _check_weight(self)
        wrong = [] if self.temperature > 0 else [f"temperature={self.temperature} must be positive"]
        if self.divergence not in KINDS:
            wrong.append(f"divergence={self.divergence!r} must be one of {', '.join(KINDS)}")
        for name, kind, usual in (("skew", "skew_kl", 0.1), ("beta", "jsd", 0.5)):
            share = getattr(self, name)
            if not 0 < share < 1:
                wrong.append(f"{name}={share} must lie between 0 and 1, both excluded")
            elif share != usual and self.divergence != kind:
                wrong.append(f"{name}={share} counts for divergence={kind} only, not for {self.divergence!r}")
        if wrong:
            raise InputError(f"Logits: {'; '.join(wrong)}.")

    @property
    def formula(self) -> Divergence:
        """The divergence as the losses take it."""
        return Divergence(self.divergence, self.temperature, self.skew if self.divergence == "skew_kl" else self.beta)


@dataclass(frozen=True)
class Boundary(Level):
    """Distance of a student layer's output to the teacher's where its last ancestor ended (after CoMe, 2510.15304)."""

    weight: float = 1.0
    """Factor of this term, which is averaged over layers and tokens."""
    distance: Literal["cosine", "mse"] = "cosine"
    """1 - cosine, or squared error relative to the teacher's squared norm, token by token."""
    layers: Literal["merged", "all"] = "merged"
    """Which student layers are taught: those that were merged, or every one."""
    final_weight: float | None = None
    """The weight moves to this one in a straight line over the phase; 0 lets the term fade out; null = it stays."""
    scale: Literal["fixed", "logits"] = "fixed"
    """`logits`: the term counts L_logits / L_boundary times more, so that weight is its share of the logits' loss
    (Minitron, arXiv:2407.14679); needs Logits beside it."""

    def __post_init__(self) -> None:
        _check_weight(self)
        wrong = []
        if self.distance not in ("cosine", "mse"):
            wrong.append(f"distance={self.distance!r} must be cosine or mse")
        if self.layers not in ("merged", "all"):
            wrong.append(f"layers={self.layers!r} must be merged or all")
        if self.scale not in ("fixed", "logits"):
            wrong.append(f"scale={self.scale!r} must be fixed or logits")
        if self.final_weight is not None and not self.final_weight >= 0:
            wrong.append(f"final_weight={self.final_weight} must be 0 or more, or null")
        if wrong:
            raise InputError(f"Boundary: {'; '.join(wrong)}.")

    def weight_at(self, progress: float) -> float:
        """The weight when so much of the phase is over, from 0 to 1."""
        final = self.weight if self.final_weight is None else self.final_weight
        return self.weight + (final - self.weight) * progress


@dataclass(frozen=True)
class Local(Level):
    """Every merged layer alone: given the stream before its ancestors, it has to reach the stream behind them (CoMe).

    No gradient leaves the layer, so nothing else is run backwards, and no head is needed.
    """

    weight: float = 1.0
    """Factor of this term, which is averaged over merged layers and tokens."""
    distance: Literal["cosine", "mse"] = "mse"
    """1 - cosine, or squared error relative to the teacher's squared norm, token by token."""
    inputs: Literal["teacher", "student"] = "teacher"
    """What a layer is given: h_{first-1} of the teacher, or what the student's own layers below make of the text,
    which removes the mismatch that teacher forcing leaves and costs a forward pass of the student."""

    def __post_init__(self) -> None:
        _check_weight(self)
        wrong = [] if self.distance in ("cosine", "mse") else [f"distance={self.distance!r} must be cosine or mse"]
        if self.inputs not in ("teacher", "student"):
            wrong.append(f"inputs={self.inputs!r} must be teacher or student")
        if wrong:
            raise InputError(f"Local: {'; '.join(wrong)}.")


@dataclass(frozen=True)
class Labels(Level):
    """Cross-entropy of the next token of the text."""

    weight: float = 1.0
    """Factor of this term."""

    def __post_init__(self) -> None:
        _check_weight(self)


def _check_weight(level: Level) -> None:
    if not level.weight > 0:
        raise InputError(
            f"weight={level.weight} of {type(level).__name__} must be positive: leave the level out instead."
        )


def check(levels: Sequence[Level]) -> None:
    """Raises InputError unless there is at least one level, none twice, and each has what it needs beside it."""
    listed = levels if isinstance(levels, Sequence) else [levels]
    strange = [level for level in listed if not isinstance(level, Logits | Boundary | Local | Labels)]
    if strange or listed is not levels:
        raise InputError(
            f"objective={strange or levels} must be a list of levels, each Logits(), Boundary(), Local() or Labels(): "
            "a term of your own is added to what super().training_step returns in a subclass of DistillationModule."
        )
    names = [type(level).__name__ for level in levels]
    if not names or len(names) != len(set(names)):
        raise InputError(
            f"objective={names} must name at least one of Logits, Boundary, Local, Labels, and none twice."
        )
    boundary = only(levels, Boundary)
    if boundary is not None and boundary.scale == "logits" and only(levels, Logits) is None:
        raise InputError(
            f"objective={names}: Boundary with scale=logits needs Logits beside it: add it, or scale: fixed."
        )


def only(levels: Sequence[Level], kind: type[LevelT]) -> LevelT | None:
    """The level of that kind, if there is one."""
    return next((level for level in levels if isinstance(level, kind)), None)
