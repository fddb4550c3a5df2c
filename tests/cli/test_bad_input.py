"""A user's mistakes: each ends in one sentence and status 2 (1 for the machine's), and nothing half-written stays."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from lcprune.cli import main
from tests.builders import save_tiny, tiny_llama
from tests.cli.corpus import COMMANDS, DATA, RECIPES, TEXTS, Parts
from tests.cli.corpus_files import CHECKPOINTS, MODELS, PLANS
from tests.cli.recipe import recipe, text_file, write


def _sentence(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lcprune: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", RECIPES)
def test_mistake_in_a_recipe_is_one_sentence_and_leaves_nothing(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    changes, expected = RECIPES[name]
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", **changes)
    monkeypatch.setattr("lcprune.distillation.resumable.load_pair", _never)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 2
    assert_says(capsys, expected)
    assert not (tmp_path / "run").exists()


def test_student_that_is_no_student_is_one_sentence_before_weights_are_loaded(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcprune.distillation.resumable.load_pair", _never)
    for wrong in (tmp_path / "nowhere", tiny_folder):
        content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", model__student=str(wrong))
        assert main(["fit", "--config", str(write(tmp_path, content))]) == 2
        assert "holds no history.json: name a folder that lcprune collapse" in _sentence(capsys)


def assert_says(capsys: pytest.CaptureFixture[str], expected: Parts) -> None:
    """One sentence with these parts in it, and a full stop at its end alone."""
    sentence = _sentence(capsys)
    assert all(part in sentence for part in expected), sentence
    assert sentence.endswith("."), sentence
    assert ". " not in sentence, sentence


def _never(*args: object) -> None:
    pytest.fail("weights were loaded before the mistake was found")


@pytest.mark.parametrize("name", COMMANDS)
def test_mistake_on_the_command_line_is_one_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    arguments, expected = COMMANDS[name]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format": 1, "teacher_depth": 6, "steps": []}))
    monkeypatch.chdir(tmp_path)
    assert main([str(plan) if argument == "PLAN" else argument for argument in arguments]) == 2
    assert_says(capsys, expected)
    assert list(tmp_path.iterdir()) == [plan]


@pytest.mark.parametrize("target", [0, 6, 7])
def test_collapse_to_an_impossible_depth_is_refused(
    target: int, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    out = tmp_path / "short"
    assert main(["collapse", "--config", str(config), "--target-depth", str(target), "--out", str(out)]) == 2
    assert_says(capsys, (f"target_depth={target} must lie between 1 and 5", "give another --target-depth"))
    assert not out.exists()


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = write(folder, recipe(tiny_folder, text_file(folder), folder / "run"))
    assert main(["fit", "--config", str(config)]) == 0
    return folder / "run" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_that_does_not_fit_is_refused_before_weights_are_loaded(
    name: str,
    checkpoint: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    spoil, expected = CHECKPOINTS[name]
    bad = Path(shutil.copy(checkpoint, tmp_path / "bad.ckpt"))
    spoil(bad)
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    monkeypatch.setattr("lcprune.distillation.resumable.load_pair", _never)
    assert main(["fit", "--config", str(config), "--ckpt_path", str(bad)]) == 2
    assert_says(capsys, expected)
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize(
    ("setting", "value", "parts"),
    [
        ("--model.optimizer", "torch.optim.SGD", ("whose optimizer is AdamW, model.optimizer is SGD",)),
        ("--model.train", "merged", ("holds all parameters (train: all)", "ask for those of layers alone")),
    ],
)
def test_checkpoint_of_another_optimizer_is_refused_before_weights_are_loaded(
    setting: str,
    value: str,
    parts: tuple[str, ...],
    checkpoint: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    run = Path(shutil.copytree(checkpoint.parents[1], tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    content = recipe(tiny_folder, text_file(tmp_path), run, model__optimizer="torch.optim.AdamW")
    config = str(write(tmp_path, content))
    monkeypatch.setattr("lcprune.distillation.resumable.load_pair", _never)
    assert main(["fit", "--config", config, setting, value, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 2
    assert_says(capsys, (*parts, "export its student (lcprune export)", "model.student"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("name", TEXTS)
def test_file_that_is_no_recipe_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, expected = TEXTS[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["fit", "--config", str(path)]) == 2
    assert_says(capsys, expected)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", DATA)
def test_text_that_cannot_be_trained_on_is_refused_before_weights_are_loaded(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file, text, changes, expected = DATA[name]
    (tmp_path / file).write_bytes(text)
    monkeypatch.setattr("lcprune.distillation.resumable.load_pair", _never)
    content = recipe(tiny_folder, tmp_path / file, tmp_path / "run", **changes)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 2
    assert_says(capsys, expected)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("name", MODELS)
def test_model_that_cannot_be_shortened_is_refused_before_weights_are_loaded(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    spoil, expected = MODELS[name]
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    spoil(folder)
    monkeypatch.setattr("lcprune.cli.options.load", _never)
    config = write(tmp_path, recipe(folder, text_file(tmp_path), tmp_path / "run"))
    assert main(["collapse", "--config", str(config), "--out", str(tmp_path / "short")]) == 2
    assert_says(capsys, expected)
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize("command", ["fit", "collapse", "collapse --stream"])
@pytest.mark.parametrize("text", ['{"num_return_sequences": 3}', "[1]"])
def test_generation_config_that_transformers_refuses_is_found_before_weights_are_loaded(
    text: str,
    command: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    for loads in ("weights.load", "cli.streaming.StoredModel"):
        monkeypatch.setattr(f"lcprune.{loads}", lambda *args, **kwargs: _never())
    config = write(tmp_path, recipe(folder, text_file(tmp_path), tmp_path / "run"))
    name, *flags = command.split()
    out = ["--out", str(tmp_path / "short")] if name == "collapse" else []
    assert main([name, "--config", str(config), *out, *flags]) == 2
    assert_says(capsys, ("generation_config.json of model", "is refused by transformers", "correct it, or delete it"))
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize("flags", [[], ["--stream"]])
@pytest.mark.parametrize("name", PLANS)
def test_plan_that_cannot_be_executed_is_refused_before_weights_are_loaded(
    name: str,
    flags: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    text, expected = PLANS[name]
    for loads in ("lcprune.cli.options.load", "lcprune.cli.streaming.StoredModel"):
        monkeypatch.setattr(loads, _never)
    (tmp_path / "plan.json").write_text(text)
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    plan, out = str(tmp_path / "plan.json"), tmp_path / "short"
    assert main(["collapse", "--config", str(config), "--plan", plan, "--out", str(out), *flags]) == 2
    assert_says(capsys, expected)
    assert not out.exists()


def test_corpus_has_sixty_cases_and_more():
    assert sum(map(len, (RECIPES, TEXTS, DATA, MODELS, CHECKPOINTS, PLANS, COMMANDS))) >= 60


def test_out_of_a_command_that_exports_nothing_is_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    assert main(["validate", "--config", str(config), "--out", str(tmp_path / "x")]) == 2
    assert "validate exports none" in _sentence(capsys)


def test_unknown_family_is_one_sentence_that_names_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    folder = save_tiny(tmp_path / "unknown", Starcoder2ForCausalLM(Starcoder2Config(vocab_size=97, **sizes)))
    config = write(tmp_path, recipe(folder, text_file(tmp_path), tmp_path / "run"))
    assert main(["fit", "--config", str(config)]) == 2
    sentence = _sentence(capsys)
    assert "'starcoder2'" in sentence
    assert "llama" in sentence
    assert "LayerLayout" in sentence


def test_foreign_folder_as_target_of_the_export_is_left_alone(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    target = tmp_path / "precious"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    assert main(["fit", "--config", str(config), "--out", str(target)]) == 2
    assert str(target) in _sentence(capsys)
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]


def test_full_disk_at_export_is_the_machines_fault_and_leaves_nothing(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lcprune.delivery.export._prove", full)
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    out = tmp_path / "short"
    assert main(["collapse", "--config", str(config), "--out", str(out)]) == 1
    assert "No space left on device" in _sentence(capsys)
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".short")]


def test_refused_depth_leaves_not_even_an_empty_run_folder(tiny_folder: Path, tmp_path: Path):
    changes = {"collapse__schedule": {"class_path": "Evenly", "init_args": {"target_depth": 40}}}
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", **changes)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 2
    assert not (tmp_path / "run").exists()


def test_recipe_for_a_deeper_model_names_both_depths(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = save_tiny(tmp_path / "model", tiny_llama(3))
    config = write(tmp_path, recipe(model, text_file(tmp_path), tmp_path / "run"))
    assert main(["fit", "--config", str(config)]) == 2
    assert "3 layers" in _sentence(capsys)
