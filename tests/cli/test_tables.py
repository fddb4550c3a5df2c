"""The table of a plan says everything and fits a terminal of 80 columns."""

from pathlib import Path

import pytest

from lcprune.cli import tables
from lcprune.delivery.figures import Figures, ModelFigures
from lcprune.merging.concat import Concat
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, Rdsc, spec_of


def shown(capsys: pytest.CaptureFixture[str], *steps: MergeStep, depth: int = 30) -> list[str]:
    tables.plan(MergeHistory(depth, steps))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("operator", "words"), [(Drop(), ["Drop"]), (Drop("first"), ["Drop", "(first)"]), (Rdsc(), ["Rdsc"])]
)
def test_plan_names_what_differs_from_the_defaults(
    operator: Operator, words: list[str], capsys: pytest.CaptureFixture[str]
):
    row = next(line for line in shown(capsys, MergeStep((3, 4), spec_of(operator), (0.25, 0.75))) if "3-4" in line)
    assert row.split("│")[4].split() == words


def test_plan_has_a_column_for_every_score_and_leaves_out_what_a_step_lacks(capsys: pytest.CaptureFixture[str]):
    lines = shown(
        capsys,
        MergeStep((3, 4), spec_of(Concat()), (0.25, 0.75), {"AngularDistance": 0.125, "weight_cosine": 0.5}),
        MergeStep((1, 2), spec_of(Concat()), (0.5, 0.5), {"weight_cosine": 0.25}),
    )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows == [
        ["1", "3-4", "3-4", "Concat", "0.25 0.75", "0.125", "0.5"],
        ["2", "1-2", "1-2", "Concat", "0.50 0.50", "", "0.25"],
    ]


def test_plan_with_one_large_group_stays_short_and_narrow(capsys: pytest.CaptureFixture[str]):
    shares = [0.5, *[0.5 / 29] * 29]
    lines = shown(capsys, MergeStep(tuple(range(30)), spec_of(Drop()), tuple(shares), {"BlockInfluence": 0.3}))
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 80
    cells = [line.split("│")[5] for line in lines if line.startswith("│")]
    assert " ".join("".join(cells).split()) == "0.50 for member 1 of 30"


def test_speeds_that_were_not_measured_are_left_out(capsys: pytest.CaptureFixture[str]):
    model = ModelFigures(layers=4, parameters=10**6, bytes=2**21)
    for speed, cell in (({"teacher": 1000.0, "student": 1500.0}, "1,500"), ({}, "")):
        tables.closing(Figures(model, model, speed, MergeHistory(4), {}), Path("out"))
        student = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│ student"))
        assert student.split("│")[5].strip() == cell
