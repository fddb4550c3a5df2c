"""Amounts are written in one way, whoever prints them."""

import re
from pathlib import Path

import pytest

from lcprune.amounts import count, size
from lcprune.merging.budget import BYTES, THOUSANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("number", "counted", "sized"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (1000, "1.0 K", "1.0 KB"),
        (40_256, "40.3 K", "40.3 KB"),
        (999_949, "999.9 K", "999.9 KB"),
        (999_960, "1.0 M", "1.0 MB"),
        (113_274_432, "113.3 M", "113.3 MB"),
        (44_390_243_902, "44.4 B", "44.4 GB"),
        (3.2e15, "3,200.0 T", "3,200.0 TB"),
    ],
)
def test_amount_has_one_decimal_and_a_unit(number: float, counted: str, sized: str):
    assert (count(number), size(number)) == (counted, sized)


def test_units_are_those_that_a_budget_takes():
    for power in range(1, 5):
        assert THOUSANDS[count(1000**power).split()[1]] == BYTES[size(1000**power).split()[1]] == 1000**power


def test_nobody_else_turns_bytes_or_parameters_into_units():
    own = re.compile(r"parameters / 1e\d|bytes / (2\*\*|1e)\d")
    files = [path for path in (ROOT / "lcprune").rglob("*.py") if own.search(path.read_text(encoding="utf-8"))]
    assert files == []
