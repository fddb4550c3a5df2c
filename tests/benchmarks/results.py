"""Measured cells in a file of JSON lines, appended as they come, and as a table of Markdown.

A long table survives interruption: what the file holds is not measured again. Every line says with which model, dtype
and windows, and with which settings of the method (a hash of them), it was made; lines of others are passed over. It
says when and on which processor, too. The code itself may change without a trace: begin a new file then.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

from lcprune.delivery.provenance import processor

Result = dict[str, Any]
"""`perplexity` (None = the planner stops before that depth), `ratio`, `seconds`, `groups`, perhaps `removed`."""


@dataclass
class Results:
    """What has been measured so far, and what was prepared for it (scores, plans)."""

    file: Path | None = None
    """Where to append; None = nowhere."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What all lines have in common."""
    _lines: dict[str, Result] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                if all(entry.pop(name) == value for name, value in self.settings.items()):
                    self._lines[entry.pop("what")] = entry

    def get(self, what: str) -> Result | None:
        """The entry of that name, if it is there."""
        return self._lines.get(what)

    def add(self, what: str, result: Result) -> Result:
        """Keeps an entry, with day and processor."""
        result = self._lines[what] = {**result, "date": date.today().isoformat(), "processor": processor()}
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"what": what, **self.settings, **result}) + "\n")
        return result

    def timed(self, what: str, compute: Callable[[], object]) -> tuple[Any, float]:
        """A value of plain data and the seconds that it took, computed unless it is there."""
        known = self.get(what)
        if known is None:
            began = perf_counter()
            value = compute()
            known = self.add(what, {"value": value, "seconds": perf_counter() - began})
        return known["value"], known["seconds"]


def table(results: Mapping[str, Mapping[int, Result]], depths: Sequence[int]) -> str:
    """Methods by depths, Markdown; a hyphen where there is no figure."""
    head = [f"{depths[0]} layers", *map(str, depths[1:])]
    lines = [["method", *head], ["---"] * (1 + len(depths))]
    lines += [[f"`{name}`", *(shown(row.get(depth)) for depth in depths)] for name, row in results.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grids(
    results: Mapping[str, Mapping[int, Result]],
    depths: Sequence[int],
    planners: Sequence[str],
    operators: Sequence[str],
    refits: Sequence[str],
) -> str:
    """A table of Markdown for each planner, operators by refits: the ratios to the dense model at all depths.

    `-` where the planner stops before, `?` where nothing was measured.
    """
    tables = []
    for planner in planners:
        lines = [[f"`{planner}`", *(f"`{refit[1:]}`" if refit else "no refit" for refit in refits)]]
        lines.append(["---"] * (1 + len(refits)))
        for operator in operators:
            rows = [results.get(f"{planner}-{operator}{refit}") for refit in refits]
            if any(rows):
                lines.append([f"`{operator}`", *(_ratios(row, depths) if row else "" for row in rows)])
        if len(lines) > 2:
            tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


def _ratios(row: Mapping[int, Result], depths: Sequence[int]) -> str:
    ratios = [row[depth].get("ratio", "-") if depth in row else "?" for depth in depths]
    return " ".join(ratio if isinstance(ratio, str) else _short(ratio, 3) for ratio in ratios)


def shown(result: Result | None) -> str:
    """Perplexity and its ratio to the dense model's."""
    if result is None or result["perplexity"] is None:
        return "-"
    return f"{_short(result['perplexity'])} ({_short(result['ratio'], 3)}x)"


def _short(number: float, digits: int = 4) -> str:
    """So many digits, as they are read most easily."""
    if not isfinite(number) or number >= 1e5:
        return f"{number:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{number:,.0f}" if number >= 1000 else f"{number:#.{digits}g}".rstrip(".")
