"""Every recipe is short, says how to run it, and can be made into objects without loading a model; overlays too."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoConfig

from lcprune.cli import main
from lcprune.cli.recipes import headline
from lcprune.cli.training import RecipeCLI, collapse_of
from lcprune.merging.budget import on_meta

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
METHODS = sorted(FOLDER.glob("*.yaml"))
OVERLAYS = sorted((FOLDER / "models").glob("*.yaml"))
CONFIGS = Path(__file__).parent / "configs"
"""The config of every overlay's model, as it is published."""
PARAMETERS = {
    "gemma-3-1b": 999_885_952,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_248_023_552,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "smollm2-135m": 134_515_008,
}
"""As their model cards on the hub count them."""
README = (FOLDER.parent / "README.md").read_text(encoding="utf-8")


PAIRS = {(method, OVERLAYS[place % len(OVERLAYS)]) for place, method in enumerate(METHODS)}
"""Every method and every overlay once; the others are left to the slow tests."""


@pytest.fixture(params=METHODS, ids=lambda path: path.stem)
def method(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(params=OVERLAYS, ids=lambda path: path.stem)
def overlay(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.mark.parametrize("path", [*METHODS, *OVERLAYS], ids=lambda path: path.stem)
def test_recipe_is_short_and_its_header_names_its_command(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert f"--config recipes/{path.relative_to(FOLDER)}" in header


@pytest.mark.parametrize("path", [*METHODS, *OVERLAYS], ids=lambda path: path.stem)
def test_recipe_has_a_headline_of_one_sentence(path: Path):
    assert re.fullmatch(r"[A-Z].{20,300}\.", headline(path))


def test_recipe_is_named_in_the_readme(method: Path):
    assert f"`{method.name}`" in README


def test_recipe_has_no_callback_of_ours_in_the_trainer(method: Path):
    assert "ProgressiveCollapse" not in str(yaml.safe_load(method.read_text(encoding="utf-8"))["trainer"])


def test_recipe_makes_every_object_and_its_schedule_fits_the_demo_model(
    method: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    cli = RecipeCLI(["--config", str(method), "--trainer.accelerator", "cpu"], run=False)
    callback = collapse_of(cli)
    settings = yaml.safe_load(method.read_text(encoding="utf-8"))
    if settings["collapse"]["schedule"] is None:  # for a student that is short already
        assert callback.schedule is None
    else:
        assert callback.schedule is not None
        callback.schedule.check(30, cli.trainer.max_steps)
        callback.planner.check(30, callback.schedule.target(30))
    assert not list(tmp_path.iterdir())


def made(method: Path, overlay: Path, *more: str) -> RecipeCLI:
    """The objects of a method over a model's shapes; nothing is fetched."""
    local = ["--model.teacher", str(CONFIGS / overlay.stem), "--trainer.accelerator", "cpu"]
    return RecipeCLI(["--config", str(method), "--config", str(overlay), *local, *more], run=False)


def test_overlay_touches_no_callbacks_and_says_what_to_fetch_and_how_much_memory(overlay: Path):
    text = overlay.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert "callbacks" not in content.get("trainer", {})
    assert f"hf download {content['model']['teacher']}" in text
    assert re.search(r"# Memory: a step takes [\d.]+ GiB with come\.yaml", text)


def test_overlay_has_the_shapes_of_its_model(overlay: Path):
    model = on_meta(AutoConfig.from_pretrained(CONFIGS / overlay.stem))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[overlay.stem]
    depths = re.match(r"# .*, from (\d+) layers to (\d+):", overlay.read_text(encoding="utf-8"))
    assert depths is not None
    assert int(depths[1]) == model.config.num_hidden_layers
    target = yaml.safe_load(overlay.read_text(encoding="utf-8"))["collapse"]["schedule"]["init_args"]["target_depth"]
    assert int(depths[2]) == target < int(depths[1])


@pytest.mark.parametrize(
    ("method", "overlay"),
    [
        pytest.param(method, overlay, marks=() if (method, overlay) in PAIRS else pytest.mark.slow)
        for method in METHODS
        for overlay in OVERLAYS
    ],
    ids=lambda path: path.stem,
)
def test_overlay_goes_with_every_method(method: Path, overlay: Path):
    alone = method.stem == "recover"
    cli = made(method, overlay, *(["--collapse.schedule", "null", "--model.student", "null"] if alone else []))
    callback = collapse_of(cli)
    callback.check(cli.trainer, cli.model)
    assert any(isinstance(each, ModelCheckpoint) for each in cli.trainer.callbacks)  # type: ignore[attr-defined]
    if alone:
        assert callback.schedule is None
        return
    assert callback.schedule is not None
    content = yaml.safe_load(method.read_text(encoding="utf-8"))["collapse"]["schedule"]["init_args"]
    wanted = yaml.safe_load(overlay.read_text(encoding="utf-8"))["collapse"]["schedule"]["init_args"]["target_depth"]
    milestones = callback.schedule.milestones(cli.model.history.teacher_depth)
    assert milestones[-1] == (content.get("last", 0), wanted)
    assert len(milestones) == content.get("merges", 1)


def planned(method: str, overlay: Path) -> float:
    """GiB that `lcprune plan` finds."""
    files = ["--config", str(FOLDER / f"{method}.yaml"), "--config", str(overlay), "--trainer.accelerator", "cpu"]
    shown = io.StringIO()
    with redirect_stdout(shown):
        assert main(["plan", *files, "--model.teacher", str(CONFIGS / overlay.stem), "--json"]) == 0
    return json.loads(shown.getvalue())["peak_memory"] / 2**30


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["come", "qlora"])
def test_overlay_says_what_plan_says_about_memory(recipe: str, overlay: Path):
    written = re.search(rf"([\d.]+) GiB with {recipe}\.yaml", overlay.read_text(encoding="utf-8"))
    assert written is not None
    assert planned(recipe, overlay) == pytest.approx(float(written[1]), abs=0.06)
