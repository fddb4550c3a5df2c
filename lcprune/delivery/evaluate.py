"""What a model can do, beside its teacher: the figures, their errors, what was retained, and the JSON that says it.

retained     student / teacher by a task's first metric, perplexity_ratio = student / teacher
ratios       the same of tasks whose first metric is better if it is lower, as a perplexity is
stderr       of a mean over n questions: standard deviation / sqrt(n), for right or wrong sqrt(p (1 - p) / (n - 1))
paired       the mean of student - teacher question by question and its error, far smaller than that of two
             independent accuracies: both answer the same questions
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from lcprune.delivery.choices import Answers
from lcprune.delivery.figures import ModelFigures
from lcprune.files import for_json

RATIO = "perplexity_ratio"
"""What `retained` calls student / teacher of the perplexity: 1 = nothing lost, higher = worse."""


@dataclass(frozen=True)
class TaskFigures:
    """A model on one task."""

    metrics: Mapping[str, float]
    """Mean by name; the first is the one that `stderr`, `scores` and `retained` are about."""
    rows: int
    """How many questions were asked."""
    scores: tuple[float, ...] = ()
    """The first metric question by question; empty where it is only known of the whole."""
    stderr: float | None = None
    """Of the first metric; None where it cannot be known."""
    lower_is_better: bool = False
    """Of the first metric."""

    def to_dict(self) -> dict[str, object]:
        """`acc`, `acc_norm` or what else was measured, `rows` and `stderr`."""
        return {**self.metrics, "rows": self.rows, "stderr": self.stderr}


@dataclass(frozen=True)
class Paired:
    """Student against teacher on the same questions."""

    difference: float
    """Mean of student - teacher."""
    stderr: float | None
    """Standard error of the difference; None = it cannot be told."""
    teacher_only: int
    """Questions on which the teacher scores more."""
    student_only: int
    """Questions on which the student scores more."""


@dataclass(frozen=True)
class ModelEvaluation:
    """Everything measured on one model."""

    name: str
    """As others call it: a hub name or a folder."""
    size: ModelFigures
    """Layers, parameters and bytes of weights."""
    perplexity: float | None
    """Perplexity on the text; None = not measured."""
    tasks: Mapping[str, TaskFigures]
    """Figures of every task, by its name."""
    repetition: float | None
    """rep-4 of what it writes; None where it writes less than four tokens."""
    tokens_per_second: Mapping[str, float]
    """`prefill` and `decode`."""
    cache_bytes_per_token: int
    """Keys and values of one token."""
    peak_bytes: int | None = None
    """Most GPU memory during a forward pass, weights included; None on a CPU."""

    def to_dict(self) -> dict[str, object]:
        """Plain data, as in evaluation.json."""
        return {
            "name": self.name,
            **asdict(self.size),
            "perplexity": self.perplexity,
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "repetition": {"rep-4": self.repetition},
            "tokens_per_second": dict(self.tokens_per_second),
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Evaluation:
    """A model, and its teacher if it has one."""

    student: ModelEvaluation
    """The model that was asked about."""
    teacher: ModelEvaluation | None = None
    """What it descends from or is compared with."""
    agreement: Mapping[str, float] = field(default_factory=dict)
    """`top1`, a share of tokens, and `kl`, KL(teacher || student) in nats per token; empty without a teacher."""
    samples: Sequence[Mapping[str, str]] = ()
    """Texts that both went on with: `prompt`, `student` and, where there is one, `teacher`."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """How it was measured."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of what measured it."""

    @property
    def retained(self) -> dict[str, float]:
        """What is left of the teacher, by task, and `perplexity_ratio`; empty without a teacher."""
        if self.teacher is None:
            return {}
        firsts = {name: share for name, share in self._shares.items() if not self.student.tasks[name].lower_is_better}
        if self.student.perplexity is not None and self.teacher.perplexity is not None:
            firsts[RATIO] = self.student.perplexity / self.teacher.perplexity
        return firsts

    @property
    def ratios(self) -> dict[str, float]:
        """Student / teacher by task, where lower is better: 1 = nothing lost, higher = worse."""
        return {name: share for name, share in self._shares.items() if self.student.tasks[name].lower_is_better}

    @property
    def _shares(self) -> dict[str, float]:
        theirs = {} if self.teacher is None else self.teacher.tasks
        return {name: _first(task) / _first(theirs[name]) for name, task in self._shared.items()}

    @property
    def paired(self) -> dict[str, Paired]:
        """The difference to the teacher on every task that is known question by question."""
        theirs = {} if self.teacher is None else self.teacher.tasks
        return {name: _paired(one.scores, theirs[name].scores) for name, one in self._shared.items() if one.scores}

    @property
    def _shared(self) -> dict[str, TaskFigures]:
        """Tasks that can be compared: the teacher scores above 0."""
        theirs = {} if self.teacher is None else self.teacher.tasks
        return {name: task for name, task in self.student.tasks.items() if name in theirs and _first(theirs[name]) > 0}

    def to_dict(self) -> dict[str, object]:
        """Plain data; `models` holds `student` and perhaps `teacher`."""
        models = {"teacher": self.teacher, "student": self.student}
        return {
            "models": {who: model.to_dict() for who, model in models.items() if model is not None},
            "agreement": dict(self.agreement),
            "retained": self.retained,
            "ratios": self.ratios,
            "paired": {name: asdict(pair) for name, pair in self.paired.items()},
            "samples": [dict(sample) for sample in self.samples],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }

    def to_json(self) -> str:
        """Indented JSON that every reader accepts: what is infinite or not a number is null."""
        return json.dumps(for_json(self.to_dict()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def of_answers(answers: Answers) -> TaskFigures:
    """A model's figures on a task of choices."""
    scores = tuple(map(float, answers.acc))
    means = {"acc": statistics.fmean(scores), "acc_norm": statistics.fmean(map(float, answers.acc_norm))}
    return TaskFigures(means, len(scores), scores, stderr(scores))


def stderr(scores: Sequence[float]) -> float | None:
    """Standard error of the mean of independent scores; None for fewer than two.

    Example:
        >>> stderr([1, 0, 1, 0])  # sqrt(0.5 * 0.5 / 3)
        0.288...
    """
    return statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None


def _paired(student: Sequence[float], teacher: Sequence[float]) -> Paired:
    differences = [mine - theirs for mine, theirs in zip(student, teacher, strict=True)]
    return Paired(
        statistics.fmean(differences),
        stderr(differences),
        sum(difference < 0 for difference in differences),
        sum(difference > 0 for difference in differences),
    )


def _first(task: TaskFigures) -> float:
    return next(iter(task.metrics.values()))
