"""What a run has logged: every metric over optimizer steps, put together from all the pieces of a resumed run.

    metrics.1.csv   step 0 .. 57    (killed; its last checkpoint was of step 50)
    metrics.2.csv   step 50 .. 81
    metrics.csv     step 80 .. 120  -> 0 .. 49 of the first, 50 .. 79 of the second, all of the last

Lightning numbers the row of an optimizer step by the steps before it, and a merge's own row by the steps that are
done; here a point lies at the number of steps done, and so at the tokens read. Standard library only.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from lcprune.errors import InputError

METRICS = "metrics.csv"
AFTER_MERGE = "_after_merge"
"""How the names of figures end that were measured right after a merge."""

Points = tuple[tuple[int, float], ...]
"""Optimizer steps done, and a value; in order."""
Row = Mapping[str, str]


@dataclass(frozen=True)
class TrainingLog:
    """The metrics of one run."""

    series: Mapping[str, Points] = field(default_factory=dict)
    """Metric -> its points; figures right after a merge are points of the metric itself."""
    merges: tuple[tuple[int, int], ...] = ()
    """Optimizer steps done at each merge, and the depth after it."""
    resumes: tuple[int, ...] = ()
    """Optimizer steps done where a resumed run goes on."""
    diverged: int | None = None
    """Optimizer steps done at the first loss that is no finite number."""

    @property
    def last_step(self) -> int:
        """Optimizer steps that were logged."""
        return max((points[-1][0] for points in self.series.values()), default=0)

    def points(self, name: str) -> Points:
        """The points of a metric; none if it was not logged."""
        return self.series.get(name, ())


def read(folder: Path) -> TrainingLog:
    """Puts together what Lightning's CSVLogger has left in a run folder; empty where it left nothing.

    Raises:
        InputError: If a file is not what CSVLogger writes.
    """
    pieces = [rows for path in _files(folder) if (rows := _rows(path))]
    begins = [min(_step(row) for row in rows) for rows in pieces]
    kept: list[Row] = []
    for number, rows in enumerate(pieces):
        # What was trained after the checkpoint that a resumed run goes on from was trained again.
        end = min(begins[number + 1 :], default=None)
        kept += [row for row in rows if end is None or _step(row) < end]
    losses = [(_done(row, "train/loss"), row["train/loss"]) for row in kept if row.get("train/loss")]
    return TrainingLog(
        series=_series(kept),
        merges=tuple((_step(row), int(float(row["depth"]))) for row in kept if _is_merge(row)),
        resumes=tuple(begins[1:]),
        diverged=min((done for done, loss in losses if not isfinite(float(loss))), default=None),
    )


def _files(folder: Path) -> list[Path]:
    """Oldest first."""
    return [path for _, path in sorted(numbered(folder).items())] + [
        path for path in (folder / METRICS,) if path.is_file()
    ]


def numbered(folder: Path) -> dict[int, Path]:
    """What a resumed run had logged before, by number; the higher the later."""
    return {int(match[1]): path for path in folder.glob("metrics.*.csv") if (match := _numbered(path.name))}


def _numbered(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"metrics\.(\d+)\.csv", name)


def _rows(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name} cannot be read ({error}).") from error
    # A run that was killed may have left half a row.
    return [row for row in rows if (row.get("step") or "").isdecimal() and None not in row.values()]


def _step(row: Row) -> int:
    return int(row["step"])


def _is_merge(row: Row) -> bool:
    """Whether the row was logged by a merge: it has a depth, and belongs to no step of training."""
    return bool(row.get("depth")) and not row.get("epoch") and not row.get("train/loss")


def _done(row: Row, name: str) -> int:
    """Optimizer steps done when a value was taken."""
    return _step(row) + (not name.endswith(AFTER_MERGE))


def _series(rows: Sequence[Row]) -> dict[str, Points]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, text in row.items():
            value = _number(text)
            if value is not None and name.startswith(("train/", "val/")):
                found.setdefault(name.removesuffix(AFTER_MERGE), []).append((_done(row, name), value))
    # A value right after a merge comes behind one of the same step that was taken before it.
    return {name: tuple(sorted(points, key=lambda point: point[0])) for name, points in found.items()}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None
