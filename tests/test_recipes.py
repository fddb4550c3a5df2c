"""Every recipe is short, says how to run it, and can be made into objects without loading a model."""

from pathlib import Path

import pytest
import yaml

from lcprune.cli.training import RecipeCLI, collapse_of

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
README = (FOLDER.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_recipe_is_short_and_its_header_names_its_command(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert f"--config recipes/{path.name}" in header


def test_recipe_is_named_in_the_readme(path: Path):
    assert f"`{path.name}`" in README


def test_recipe_has_no_callback_of_ours_in_the_trainer(path: Path):
    assert "ProgressiveCollapse" not in str(yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"])


def test_recipe_makes_every_object_and_its_schedule_fits_the_demo_model(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    cli = RecipeCLI(["--config", str(path), "--trainer.accelerator", "cpu"], run=False)
    callback = collapse_of(cli)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if settings["collapse"]["schedule"] is None:  # for a student that is short already
        assert callback.schedule is None
    else:
        assert callback.schedule is not None
        callback.schedule.check(30, cli.trainer.max_steps)
        callback.planner.check(30, callback.schedule.target(30))
    assert not list(tmp_path.iterdir())
