"""Triggers, stages and limits in a recipe."""

from pathlib import Path

import pytest
import yaml

from lcprune import ByTokens, Drop, Evenly, ProgressiveCollapse, RidgeRefit, Stage, WeightedAverage, WhenRecovered
from lcprune.cli import main
from lcprune.cli.training import RecipeCLI, collapse_of
from tests.cli import recipe

STAGES = [{"until_depth": 5, "operator": "WeightedAverage"}, {"until_depth": 4, "refit": {"class_path": "RidgeRefit"}}]
EVENLY = {"class_path": "Evenly", "init_args": {"target_depth": 4, "merges": 2, "first": 0, "last": 3}}


@pytest.fixture
def written(tiny_folder: Path, tmp_path: Path):
    def write(**changes: object) -> str:
        content = recipe.recipe(tiny_folder, recipe.text_file(tmp_path), tmp_path / "run")
        content["collapse"] = {"operator": "Drop"} | changes
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return write


def _made(path: str, *arguments: str) -> ProgressiveCollapse:
    return collapse_of(RecipeCLI(["--config", path, *arguments], run=False))


def test_schedules_nest_in_yaml_and_on_the_command_line(written):
    tokens = {"class_path": "ByTokens", "init_args": {"schedule": EVENLY}}
    assert _made(written(schedule=tokens)).schedule == ByTokens(Evenly(4, merges=2, first=0, last=3))
    recovered = {"class_path": "WhenRecovered", "init_args": {"latest": EVENLY, "within": 0.1, "patience": 3}}
    made = _made(written(schedule=recovered), "--collapse.schedule.latest.target_depth", "3")
    assert made.schedule == WhenRecovered(Evenly(3, merges=2, first=0, last=3), within=0.1, patience=3)


def test_stages_and_limit_are_read(written):
    made = _made(written(schedule=EVENLY, stages=STAGES, max_perplexity_jump=2.0))
    assert made.stages == (Stage(5, operator=WeightedAverage()), Stage(4, refit=RidgeRefit()))
    assert made.operator == Drop()
    assert made.max_perplexity_jump == 2.0


def test_stages_without_training_are_refused_and_left_out_when_asked(
    written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = written(schedule=EVENLY, stages=STAGES)
    plan = str(tmp_path / "plan.json")
    assert main(["collapse", "--config", config, "--plan-only", "--out", plan]) == 2
    assert "--collapse.stages null" in capsys.readouterr().err
    assert main(["collapse", "--config", config, "--collapse.stages", "null", "--plan-only", "--out", plan]) == 0
