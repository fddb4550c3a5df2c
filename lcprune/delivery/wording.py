"""Figures of a run in words: what a report begins with, and its tables."""

from collections.abc import Iterator, Mapping, Sequence
from math import floor, isfinite, log10

from lcprune.amounts import count, size
from lcprune.delivery.card import short_name
from lcprune.delivery.figures import ModelFigures
from lcprune.delivery.page import Headline, Table
from lcprune.delivery.runs import Run
from lcprune.delivery.tree import runs_of, when
from lcprune.merging.lineage import MergeHistory

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
ARROW, TIMES, MINUS, NONE = " \N{RIGHTWARDS ARROW} ", "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}", "\N{EN DASH}"
NO_METRIC, NO_TASK = ("rows", "stderr"), ("perplexity_ratio",)
"""What evaluation.json has beside a task's metrics, and beside the tasks."""


def title(run: Run) -> str:
    """The model and its depth before and after."""
    name = short_name(run.history.teacher if run.history and run.history.teacher else run.teacher)
    if run.history is None:
        return name
    if not run.history.steps:
        return f"{name}: {run.history.depth} layers, none merged"
    return f"{name}: {run.history.teacher_depth}{ARROW}{run.history.depth} layers"


def number(value: float | None) -> str:
    """With as many digits as tell something: 16.55, 1,204, 3.1e+07."""
    if value is None or not isfinite(value):
        return NONE if value is None else str(value)
    size = abs(value)
    form = (
        ".3g" if size >= 1e6 else ",.0f" if size >= 1000 else ".1f" if size >= 100 else ".2f" if size >= 10 else ".4g"
    )
    return format(value, form).replace("-", MINUS)


def perplexity(value: float | None) -> str:
    """With two decimals, so that those of a column stand below each other."""
    return f"{value:,.2f}" if value is not None and abs(value) < 1e4 else number(value)


def aligned(values: Sequence[float | None]) -> list[str]:
    """A column of figures with as many decimals as the largest needs to have four digits."""
    known = [abs(value) for value in values if value is not None and isfinite(value) and value]
    decimals = min(8, max(0, 3 - floor(log10(max(known))))) if known else 0
    return [number(v) if v is None or not isfinite(v) else f"{v:,.{decimals}f}".replace("-", MINUS) for v in values]


def fraction(part: float | None) -> str:
    """In percent; a dash where there is none."""
    return NONE if part is None else f"{part:.1%}"


def change(now: float, before: float) -> str:
    """By how many percent something became more or less."""
    difference = now / before - 1 if before else 0.0
    return f"{'+' if difference > 0 else MINUS if difference < 0 else ''}{abs(difference):.1%}"


def ratio(one: float | None, other: float | None) -> float | None:
    """One by the other, where both are known."""
    return None if one is None or not other else one / other


def final(run: Run, name: str) -> float | None:
    """A figure of the finished run, else the last one that was logged."""
    if run.figures is not None and name in run.figures.final:
        return run.figures.final[name]
    points = run.log.points(name)
    return points[-1][1] if points else None


def headlines(run: Run) -> tuple[Headline, ...]:
    """What somebody wants to know who reads nothing else."""
    return tuple(_headlines(run))


def _headlines(run: Run) -> Iterator[Headline]:
    if run.history is not None:
        before, after = run.history.teacher_depth, run.history.depth
        yield Headline("Layers", f"{before}{ARROW}{after}", change(after, before))
    if run.figures is not None:
        teacher, student, speed = run.figures.teacher, run.figures.student, run.figures.speed
        was, now = count(teacher.parameters), count(student.parameters)
        yield Headline("Parameters", now, f"was {was} ({change(student.parameters, teacher.parameters)})")
        yield Headline(
            "On disk", size(student.bytes), f"was {size(teacher.bytes)} ({change(student.bytes, teacher.bytes)})"
        )
        if speed:
            note = f"{number(speed['student'])} tokens/s, was {number(speed['teacher'])}"
            yield Headline("Speed", f"{speed['student'] / speed['teacher']:.2f}{TIMES}", note)
    ours, theirs = final(run, "val/perplexity"), final(run, "val/teacher_perplexity")
    if ours is not None:
        relative = ratio(ours, theirs)
        note = "held-out text" if relative is None else f"{relative:.2f}{TIMES} the teacher's {perplexity(theirs)}"
        yield Headline("Perplexity", perplexity(ours), note)
    agreement = final(run, "val/agreement")
    if agreement is not None:
        yield Headline("Agreement", fraction(agreement), "of most likely tokens are the teacher's")


def models_table(run: Run) -> tuple[Table, ...]:
    """The teacher, what every merge left, the student at the end."""
    if run.history is None or run.figures is None:
        return ()
    rows = [_model_row("teacher", run.figures.teacher, run.figures.speed.get("teacher"), run, "val/teacher_perplexity")]
    depth = run.history.teacher_depth
    for step in run.history.steps:
        depth -= step.absorbed
        if "val/perplexity" in step.measured:
            measured = [perplexity(step.measured["val/perplexity"]), fraction(step.measured.get("val/agreement"))]
            rows.append((f"right after the merge: {when(step.global_step)}", str(depth), "", "", "", *measured))
    rows.append(_model_row("student", run.figures.student, run.figures.speed.get("student"), run, "val/perplexity"))
    head = ("", "layers", "parameters", "on disk", "tokens/s", "perplexity", "agreement")
    note = (
        "Perplexity, and agreement with the teacher's most likely token, on the run's held-out text; tokens/s: a "
        "forward pass with logits, both models in turn."
    )
    return (Table(head, tuple(rows), note),)


def _model_row(named: str, model: ModelFigures, speed: float | None, run: Run, name: str) -> tuple[str, ...]:
    agreement = final(run, "val/agreement") if named == "student" else None
    counted = (
        named,
        str(model.layers),
        count(model.parameters),
        size(model.bytes),
        "" if speed is None else number(speed),
    )
    return (*counted, perplexity(final(run, name)), fraction(agreement) if named == "student" else "")


def merges_table(history: MergeHistory) -> tuple[Table, ...]:
    """Every merge: when, which teacher layers, how."""
    if not history.steps:
        return ()
    reached, rows = MergeHistory(history.teacher_depth), list[tuple[str, ...]]()
    for step in history.steps:
        ancestors = [layer for index in step.group for layer in reached.lineage[index]]
        reached = reached.append(step)
        refit = "" if step.refit is None else f" + {step.refit_name}"
        rows.append((when(step.global_step), runs_of(ancestors), str(reached.depth), step.operator_name + refit))
    scored = list(dict.fromkeys(name for step in history.steps for name in step.scores))
    columns = [aligned([step.scores.get(name) for step in history.steps]) for name in scored]
    head = ("merge", "teacher's layers", "layers left", "operator", *(name.replace("_", " ") for name in scored))
    return (Table(head, tuple((*row, *(column[at] for column in columns)) for at, row in enumerate(rows))),)


def evaluation_table(evaluation: Mapping[str, object] | None) -> tuple[Table, ...]:
    """What `lcprune evaluate` measured of both; nothing where it measured nothing that is known here."""
    models = _mapping(_mapping(evaluation).get("models"))
    teacher, student = (_mapping(models.get(name)) for name in ("teacher", "student"))
    before, errors_before, errors = _flat(teacher), _errors(teacher), _errors(student)
    rows = []
    for name, value in _flat(student).items():
        was, now = aligned([before.get(name), value])
        within = [f"{error[name]:.4f}" if name in error else "" for error in (errors_before, errors)]
        rows.append((name, was, within[0], now, within[1], fraction(ratio(value, before.get(name)))))
    agreement = _numbers(_mapping(_mapping(evaluation).get("agreement")))
    rows += [(f"agreement with the teacher: {name}", "", "", number(value), "", "") for name, value in agreement]
    head = ("", "teacher", PLUS_MINUS, "student", PLUS_MINUS, "student / teacher")
    return (Table(head, tuple(rows)),) if rows else ()


def retained(evaluation: Mapping[str, object] | None) -> float | None:
    """Mean over the tasks of the student's score as a part of the teacher's; None where no task was run."""
    parts = [value for name, value in _numbers(_mapping(_mapping(evaluation).get("retained"))) if name not in NO_TASK]
    return sum(parts) / len(parts) if parts else None


def _flat(model: Mapping[str, object]) -> dict[str, float]:
    """Its figures by the names that the table gives them."""
    found = dict(_numbers({"perplexity": model.get("perplexity")}))
    for task, values in _mapping(model.get("tasks")).items():
        found |= {f"{task} {name}": value for name, value in _numbers(_mapping(values)) if name not in NO_METRIC}
    for group, title in (("repetition", "repetition"), ("tokens_per_second", "tokens/s")):
        found |= {f"{title}, {name}": value for name, value in _numbers(_mapping(model.get(group)))}
    return found


def _errors(model: Mapping[str, object]) -> dict[str, float]:
    """The standard error of a task's first metric, by the name that the table gives it."""
    found = {}
    for task, values in _mapping(model.get("tasks")).items():
        known = dict(_numbers(_mapping(values)))
        first = next((name for name in known if name not in NO_METRIC), None)
        if first is not None and "stderr" in known:
            found[f"{task} {first}"] = known["stderr"]
    return found


def _numbers(values: Mapping[str, object]) -> list[tuple[str, float]]:
    return [(name, float(value)) for name, value in values.items() if isinstance(value, int | float)]


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
