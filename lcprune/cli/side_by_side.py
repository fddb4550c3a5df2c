"""The table of `evaluate`: teacher, student, and what is left of the one in the other."""

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from lcprune.amounts import count, size
from lcprune.delivery.evaluate import RATIO, Evaluation, ModelEvaluation, TaskFigures

Row = tuple[str, ...]
"""What is measured, teacher, student, retained."""


def show(evaluation: Evaluation) -> None:
    """Prints an evaluation."""
    table = Table(title=f"{evaluation.student.name}", title_justify="left")
    for heading in headings(evaluation):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows(evaluation):
        table.add_row(*row)
    Console().print(table)


def headings(evaluation: Evaluation) -> Row:
    """Those of the columns."""
    return ("", "teacher", "student", "retained") if evaluation.teacher is not None else ("", "model")


def rows(evaluation: Evaluation) -> Iterator[Row]:
    """The lines of the table; without a teacher two columns, else four."""
    yield from _sizes(evaluation)
    ratio = evaluation.retained.get(RATIO)
    yield _row(
        evaluation, "perplexity", lambda model: _number(model.perplexity), "" if ratio is None else f"{ratio:.2f}x"
    )
    if evaluation.agreement:
        yield "agreement", "", f"{evaluation.agreement['top1']:.1%}", ""
        yield "KL, nats per token", "", f"{evaluation.agreement['kl']:.3f}", ""
    for name in evaluation.student.tasks:
        yield from _task(evaluation, name)
    yield _row(evaluation, "rep-4", lambda model: _number(model.repetition))
    for way in ("prefill", "decode"):
        yield _speed(evaluation, way)


def _sizes(evaluation: Evaluation) -> Iterator[Row]:
    mine, theirs = evaluation.student.size, None if evaluation.teacher is None else evaluation.teacher.size
    yield _row(evaluation, "layers", lambda model: str(model.size.layers))
    parameters = _share(mine.parameters, None if theirs is None else theirs.parameters)
    yield _row(evaluation, "parameters", lambda model: count(model.size.parameters), parameters)
    stored = _share(mine.bytes, None if theirs is None else theirs.bytes)
    yield _row(evaluation, "weights", lambda model: size(model.size.bytes), stored)
    yield _row(evaluation, "cache per token", lambda model: size(model.cache_bytes_per_token))
    if evaluation.student.peak_bytes is not None:
        yield _row(evaluation, "peak memory", lambda model: size(model.peak_bytes or 0))


def _task(evaluation: Evaluation, name: str) -> Iterator[Row]:
    """The first metric with its errors, then the others."""
    first, *others = evaluation.student.tasks[name].metrics
    pair = evaluation.paired.get(name)
    retained = f"{evaluation.retained[name]:.1%}" if name in evaluation.retained else ""
    if name in evaluation.ratios:
        retained = f"{evaluation.ratios[name]:.2f}x"
    if pair is not None and pair.stderr is not None:
        retained += f" ({pair.difference:+.3f} ± {pair.stderr:.3f})"
    yield _row(evaluation, f"{name} {first}", lambda model: _with_error(model.tasks[name]), retained)
    for metric in others:
        yield _row(evaluation, f"{name} {metric}", _metric(name, metric))


def _metric(name: str, metric: str) -> Callable[[ModelEvaluation], str]:
    return lambda model: f"{model.tasks[name].metrics[metric]:.3f}"


def _with_error(task: TaskFigures) -> str:
    value = next(iter(task.metrics.values()))
    return f"{value:.3f}" if task.stderr is None else f"{value:.3f} ± {task.stderr:.3f}"


def _speed(evaluation: Evaluation, way: str) -> Row:
    retained = ""
    if evaluation.teacher is not None:
        retained = f"{evaluation.student.tokens_per_second[way] / evaluation.teacher.tokens_per_second[way]:.2f}x"
    return _row(evaluation, f"{way}, tokens/s", lambda model: f"{model.tokens_per_second[way]:,.0f}", retained)


def _row(evaluation: Evaluation, name: str, value: Callable[[ModelEvaluation], str], retained: str = "") -> Row:
    if evaluation.teacher is None:
        return name, value(evaluation.student)
    return name, value(evaluation.teacher), value(evaluation.student), retained


def _share(mine: float, theirs: float | None) -> str:
    return "" if theirs is None else f"{mine / theirs:.1%}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}" if value < 1 else f"{value:.2f}"
