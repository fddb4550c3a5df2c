"""Rich tables: a plan, scores of layers, and what became of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import inf, isfinite, isnan
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lcprune.amounts import count, size
from lcprune.delivery.figures import Figures, ModelFigures
from lcprune.merging.criteria import SAFEST, ranking
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.operators import Operator, from_spec

ORTHOGONAL = 0.1
"""Below this mean cosine between weights, adding or averaging them is hopeless without training."""
MOST_SHARES = 4
"""Members whose shares are listed one by one."""
LAYER_WIDTH, SCORE_WIDTH = 9, 20
"""Columns of the terminal that the number of a layer and its score take in the table of scores, lines included."""


def plan(history: MergeHistory) -> None:
    """A plan or history, one row per merge, and a warning where the operator cannot work well."""
    table = Table(title=f"{history.teacher_depth} layers -> {history.depth}", title_justify="left")
    names = list(dict.fromkeys(name for step in history.steps for name in step.scores))
    for heading in ("merge", "layers", "teacher", "operator", "shares"):
        table.add_column(heading, overflow="fold")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    reached = MergeHistory(history.teacher_depth)
    hopeless = []
    for number, step in enumerate(history.steps, 1):
        ancestors = [layer for index in step.group for layer in reached.lineage[index]]
        operator = from_spec(step.operator)
        table.add_row(
            str(number),
            _run(step.group),
            _run(ancestors),
            _short(operator),
            _shares(step.shares),
            *(f"{step.scores[name]:.4g}" if name in step.scores else "" for name in names),
        )
        if operator.elementwise and step.scores.get("weight_cosine", 1.0) < ORTHOGONAL:
            hopeless.append(number)
        reached = reached.append(step)
    console = Console()
    console.print(table)
    if hopeless:
        console.print(
            f"[yellow]warning:[/] the weights in merge {', '.join(map(str, hopeless))} are nearly orthogonal "
            f"(cosine below {ORTHOGONAL}): adding them entry by entry destroys both unless training follows."
        )


def scores(columns: Mapping[str, Sequence[float]]) -> None:
    """Every criterion over every layer, lower = safer to merge, with a bar and the rank of the safest five.

    Criteria that do not fit beside each other go into tables below each other.
    """
    console = Console()
    names = list(columns)
    beside = max(1, (console.width - LAYER_WIDTH) // SCORE_WIDTH)
    for first in range(0, len(names), beside):
        shown = names[first : first + beside]
        table = Table(title=f"lower = safer to merge; 1 to {SAFEST} = the safest", title_justify="left")
        table.add_column("layer", justify="right")
        for name in shown:
            table.add_column(name.replace("(", " ("), width=SCORE_WIDTH - 3)
        rows = max(len(columns[name]) for name in shown)
        for layer, cells in enumerate(zip(*(_cells(columns[name], rows) for name in shown), strict=True)):
            table.add_row(str(layer), *cells)
        console.print(table)


def closing(figures: Figures, out: Path) -> None:
    """Depth, parameters, size, speed and perplexity: the teacher, after every merge, the student."""
    table = Table(title="what became of it", title_justify="left")
    for heading in ("", "layers", "parameters", "on disk", "tokens/s", "perplexity"):
        table.add_column(heading, justify="left" if not heading else "right")
    teacher, student, final = figures.teacher, figures.student, figures.final
    table.add_row(*_model_row("teacher", teacher, figures.speed.get("teacher"), final.get("val/teacher_perplexity")))
    reached = MergeHistory(figures.history.teacher_depth)
    for step in figures.history.steps:
        reached = reached.append(step)
        if "val/perplexity" in step.measured:
            when = f"merge, step {step.global_step}"
            table.add_row(when, str(reached.depth), "", "", "", f"{step.measured['val/perplexity']:.2f}")
    table.add_row(*_model_row("student", student, figures.speed.get("student"), final.get("val/perplexity")))
    console = Console()
    console.print(table)
    console.print(_verdict(figures))
    console.print(f"student: {out}", soft_wrap=True)


def _verdict(figures: Figures) -> str:
    final = figures.final.get("val/perplexity")
    if final is None:
        return "no validation batches, nothing measured (trainer.limit_val_batches)"
    measured = [step.measured["val/perplexity"] for step in figures.history.steps if "val/perplexity" in step.measured]
    sentence = f"agrees with the teacher on {figures.final['val/agreement']:.1%} of the validation tokens"
    if measured:
        sentence = f"perplexity {final / measured[-1] - 1:+.0%} since the last merge; {sentence}"
    return sentence


def _model_row(name: str, model: ModelFigures, speed: float | None, value: float | None) -> tuple[str, ...]:
    return (
        name,
        str(model.layers),
        count(model.parameters),
        size(model.bytes),
        "" if speed is None else f"{speed:,.0f}",
        "not measured" if value is None else f"{value:.2f}",
    )


def _cells(values: Sequence[float], rows: int) -> list[str]:
    """A score, a bar and a rank per row; empty where a criterion about spans has no score any more."""
    ranks = {layer: rank for rank, layer in enumerate(ranking(values), 1)}
    finite = [value for value in values if isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    cells = []
    for layer, value in enumerate(values):
        part = (value - low) / (high - low) if isfinite(value) and high > low else float(value == inf)
        mark = f" {ranks[layer]}" if ranks[layer] <= SAFEST and not isnan(value) else ""
        cells.append(f"{value:9.4g} {'█' * round(5 * part):<5}{mark}")
    return cells + [""] * (rows - len(values))


def _short(operator: Operator) -> str:
    """The class, and the values of the arguments that are not the defaults: Drop (first)."""
    settings = [(getattr(operator, field.name), field.default) for field in fields(operator)]  # type: ignore[arg-type]
    given = [str(value) for value, usual in settings if value != usual]
    return type(operator).__name__ + (f" ({', '.join(given)})" if given else "")


def _shares(shares: Sequence[float]) -> str:
    """The fractions; of a large group the largest and whose it is, counted from the base on."""
    if len(shares) <= MOST_SHARES:
        return " ".join(f"{share:.2f}" for share in shares)
    largest = max(range(len(shares)), key=shares.__getitem__)
    return f"{shares[largest]:.2f} for member {largest + 1} of {len(shares)}"


def _run(layers: Sequence[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
