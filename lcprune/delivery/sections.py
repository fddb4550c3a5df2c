"""The parts of a report, each a group of pictures and tables; a part with nothing to show is empty."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lcprune.delivery import pictures, plots
from lcprune.delivery.likeness import Inside, Likeness
from lcprune.delivery.page import Group, Picture, Table
from lcprune.delivery.pictures import DARK, LIGHT, Theme
from lcprune.delivery.plots import Clock, Spot
from lcprune.delivery.runs import Run
from lcprune.delivery.samples import Sample
from lcprune.delivery.wording import (
    NONE,
    TIMES,
    count,
    evaluation_table,
    final,
    fraction,
    merges_table,
    models_table,
    perplexity,
    ratio,
    retained,
)


@dataclass(frozen=True)
class Look:
    """What was found out with the weights of teacher and student."""

    likeness: Likeness | None = None
    """None = the weights were not looked at."""
    before: tuple[float, ...] | None = None
    """Kinship of the student merged but not trained."""
    samples: tuple[Sample, ...] = ()
    """Generated text."""
    missing: tuple[str, ...] = ()
    """A sentence for each thing that could not be had."""


def training(run: Run) -> Group:
    """Loss and perplexity over tokens."""
    log, clock = run.log, Clock(run.tokens_per_step)
    drawn: list[Picture] = []
    if log.points("train/loss"):
        drawn += _drawn("loss", f"Training loss over {clock.unit}", lambda theme: plots.loss(log, clock, theme))
    if log.points("val/perplexity"):
        drawn += _drawn(
            "perplexity", f"Perplexity over {clock.unit}", lambda theme: plots.perplexity(log, clock, theme)
        )
    said = ["Vertical lines are merges, in the colours of the family tree; the figure is the number of layers left."]
    if clock.tokens_per_step is None:
        said.append("Over optimizer steps, because the recipe does not say on how many devices they were made.")
    return Group("Training", " ".join(said if log.merges else said[1:]), tuple(drawn))


def merges(run: Run) -> Group:
    """Model by model, and merge by merge."""
    tables = models_table(run) + (() if run.history is None else merges_table(run.history))
    return Group("Figures", "", tables=tables)


def layers(run: Run, look: Look) -> Group:
    """How near every student layer's stream is to the teacher's."""
    likeness, history = look.likeness, run.history
    if likeness is None or history is None:
        return Group("Student against teacher, layer by layer", "")
    merged = [layer for layer, ancestors in enumerate(history.lineage) if len(ancestors) > 1]
    named = "trained" if run.log.series else "merged"
    note = (
        f"Every student layer's stream beside the teacher's after the last layer that it descends from, over "
        f"{likeness.tokens:,} tokens; 1 = the same direction."
    )
    drawn = _drawn(
        "kinship",
        "Cosine of the student's stream with the teacher's, per student layer",
        lambda theme: plots.kinship(look.before, likeness.kinship, merged, theme, named),
    )
    return Group("Student against teacher, layer by layer", note, drawn, (_worst(look, likeness, run),))


def _worst(look: Look, likeness: Likeness, run: Run) -> Table:
    """Mean and least cosine, before and after."""
    rows = [_kin_row("merged, not trained", look.before)] if look.before is not None else []
    rows.append(_kin_row("trained" if run.log.series else "merged", likeness.kinship))
    return Table(("cosine", "mean", "least", "in layer", "last layer"), tuple(rows))


def _kin_row(named: str, cosines: Sequence[float]) -> tuple[str, ...]:
    least = min(range(len(cosines)), key=cosines.__getitem__)
    mean = sum(cosines) / len(cosines)
    return (named, f"{mean:.4f}", f"{cosines[least]:.4f}", str(least), f"{cosines[-1]:.4f}")


def similarity(look: Look) -> Group:
    """Heat maps of the teacher and of the student, on one scale."""
    title = "What the layers have in common"
    if look.likeness is None:
        return Group(title, "")
    models = {"teacher": look.likeness.teacher, "student": look.likeness.student}
    lowest = min(value for model in models.values() for row in model.cosines for value in row)
    note = (
        "The cosine of the residual stream between layers (bright: they change little), and the L2 distance between "
        "the weights of neighbours (beside a name: relative to their size, 1 = orthogonal). Both models on one scale."
    )
    drawn = tuple(
        picture
        for draw in (_heat(lowest), _distances(list(models.values())))
        for named, model in models.items()
        for picture in draw(named, model)
    )
    return Group(title, note, drawn)


def _heat(lowest: float) -> Callable[[str, Inside], tuple[Picture, ...]]:
    return lambda named, model: _drawn(
        f"stream-{named}",
        f"Cosine of the stream between the layers of the {named}",
        lambda theme: plots.heat(model.cosines, lowest, theme, named),
    )


def _distances(models: Sequence[Inside]) -> Callable[[str, Inside], tuple[Picture, ...]]:
    highest = max((value for model in models for row in model.weights.raw for value in row), default=1.0)

    def draw(named: str, model: Inside) -> tuple[Picture, ...]:
        if not model.weights.raw:  # a single layer has no neighbour
            return ()
        title = f"Distance between neighbouring layers' weights of the {named}"
        return _drawn(f"weights-{named}", title, lambda theme: plots.distances(model.weights, highest, theme, named))

    return draw


def evaluated(run: Run) -> Group:
    """What `lcprune evaluate` has left."""
    return Group(
        "Evaluation",
        "As lcprune evaluate measured it; \N{PLUS-MINUS SIGN} is the standard error.",
        tables=evaluation_table(run.evaluation),
    )


def comparison(runs: Sequence[Run]) -> Group:
    """Quality against size and speed, over several runs."""
    head = ("run", "layers", "parameters", "size", "speed", "perplexity", "to teacher", "agreement", "tasks kept")
    rows = tuple(_compared(place, run) for place, run in enumerate(runs, 1))
    note = (
        f"Size, speed and perplexity relative to each run's own teacher, on its own held-out text; {NONE} = not there. "
        "In the pictures 0 is the teacher, and the line joins those that no other beats in both."
    )
    size, speed = _spots(runs, _size), _spots(runs, _speed)
    drawn: tuple[Picture, ...] = ()
    if len(size) > 1:
        drawn += _drawn(
            "size",
            "Perplexity against parameters, relative to the teacher",
            lambda theme: plots.frontier(size, -1, "parameters, teacher = 1 (fewer is better)", theme),
        )
    if len(speed) > 1:
        drawn += _drawn(
            "speed",
            "Perplexity against speed, relative to the teacher",
            lambda theme: plots.frontier(speed, 1, "tokens per second, teacher = 1 (more is better)", theme),
        )
    return Group("Quality against size and speed", note, drawn, (Table(head, rows),))


def _compared(place: int, run: Run) -> tuple[str, ...]:
    history, figures = run.history, run.figures
    ours = final(run, "val/perplexity")
    relative, size, speed = ratio(ours, final(run, "val/teacher_perplexity")), _size(run), _speed(run)
    return (
        f"{place}  {run.name}",
        NONE if history is None else f"{history.teacher_depth} \N{RIGHTWARDS ARROW} {history.depth}",
        NONE if figures is None else count(figures.student.parameters),
        fraction(size),
        NONE if speed is None else f"{speed:.2f}{TIMES}",
        perplexity(ours),
        NONE if relative is None else f"{relative:.2f}{TIMES}",
        fraction(final(run, "val/agreement")),
        fraction(retained(run.evaluation)),
    )


def _spots(runs: Sequence[Run], cost: Callable[[Run], float | None]) -> list[Spot]:
    """The teacher, and every run of which both are known, by its number."""
    spots = [Spot("0", 1.0, 1.0)]
    for place, run in enumerate(runs, 1):
        loss, spent = ratio(final(run, "val/perplexity"), final(run, "val/teacher_perplexity")), cost(run)
        if loss is not None and spent is not None:
            spots.append(Spot(str(place), spent, loss))
    return spots


def _size(run: Run) -> float | None:
    return None if run.figures is None else ratio(run.figures.student.parameters, run.figures.teacher.parameters)


def _speed(run: Run) -> float | None:
    return None if run.figures is None else ratio(*map(run.figures.speed.get, ("student", "teacher")))


def _drawn(name: str, title: str, draw: Callable[[Theme], bytes]) -> tuple[Picture, ...]:
    """The picture in both themes; none where there is nothing to draw with."""
    if pictures.missing() is not None:
        return ()
    return (Picture(name, title, draw(LIGHT), draw(DARK)),)
