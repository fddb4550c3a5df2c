"""A user's mistakes: each ends in one sentence and status 2 (1 for the machine's), and nothing half-written stays."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcprune.cli import main
from tests.builders import save_tiny, tiny_llama
from tests.cli.recipe import recipe, text_file, write


def _sentence(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lcprune: ")]
    assert len(lines) == 1
    return lines[0]


# What is changed in a good recipe, and what the sentence has to say: field, value, and the way out.
RECIPES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "misspelt trainer key": ({"trainer__max_stepz": 3}, ("max_stepz", "did you mean", "max_steps")),
    "misspelt section": ({"modle": {"teacher": "x"}}, ("modle", "did you mean model")),
    "misspelt argument of a class": (
        {"collapse__schedule": {"class_path": "Evenly", "init_args": {"target_dept": 4}}},
        ("target_dept", "did you mean", "target_depth"),
    ),
    "unknown planner": ({"collapse__planner": "OneShotRankin"}, ("OneShotRankin", "did you mean OneShotRanking")),
    "unknown level": ({"model__objective": [{"class_path": "Logitz"}]}, ("Logitz", "did you mean Logits")),
    "class of another family": ({"collapse__operator": "OneShotRanking"}, ("collapse.operator", "OneShotRanking")),
    "unknown optimizer": (
        {"model__optimizer": {"class_path": "torch.optim.AdamX"}},
        ("model.optimizer", "AdamX"),
    ),
    "text for a number": ({"data__block_size": "x"}, ("data.block_size=x", "whole number")),
    "word outside a list": ({"model__train": "layer"}, ("model.train=layer", "all, layers")),
    "target depth 0": (
        {"collapse__schedule": {"class_path": "Evenly", "init_args": {"target_depth": 0}}},
        ("target_depth=0", "at least 1"),
    ),
    "target depth of the model": (
        {"collapse__schedule": {"class_path": "Evenly", "init_args": {"target_depth": 6}}},
        ("target depth 6", "between 1 and 5"),
    ),
    "target depth above the model's": (
        {"collapse__schedule": {"class_path": "Evenly", "init_args": {"target_depth": 40}}},
        ("target depth 40", "between 1 and 5", "6 layers"),
    ),
    "merge behind the end": ({"trainer__max_steps": 2}, ("step 3", "max_steps=2", "train longer")),
    "negative weight": (
        {"model__objective": [{"class_path": "Logits", "init_args": {"weight": -1}}]},
        ("weight=-1", "positive"),
    ),
    "level twice": ({"model__objective": [{"class_path": "Logits"}, {"class_path": "Logits"}]}, ("none twice",)),
    "missing model": ({"model__teacher": "./nowhere"}, ("./nowhere", "does not exist", "demo:smollm2")),
    "model that is not on the hub": ({"model__teacher": "nobody/nothing-at-all"}, ("nobody/nothing-at-all", "local")),
    "missing data": ({"data__path": "nowhere.jsonl"}, ("data.path=nowhere.jsonl", "does not exist")),
    "block longer than the text": ({"data__block_size": 100_000}, ("100000", "lower data.block_size")),
    "batch larger than the text": ({"data__batch_size": 5000}, ("data.batch_size=5000", "lower data.batch_size")),
    "layer that is not there": (
        {"collapse__planner": {"class_path": "FixedPlan", "init_args": {"groups": [[5, 6, 7]]}}},
        ("layer 7", "0 to 5"),
    ),
    "optimizer that cannot start afresh": (
        {"model__optimizer": {"class_path": "torch.optim.NAdam", "init_args": {"lr": 1e-3}}},
        ("NAdam", "starts at zero", "AdamW"),
    ),
    "scheduler of a figure": (
        {
            "model__lr_scheduler": {
                "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
                "init_args": {"monitor": "val/perplexity"},
            }
        },
        ("ReduceLROnPlateau", "RewarmingCosine"),
    ),
    "nothing to train before the first merge": (
        {
            "model__train": "after_merge",
            "collapse__schedule": {"class_path": "Evenly", "init_args": {"target_depth": 4, "first": 3}},
        },
        ("train=after_merge trains nothing before the first merge", "collapse.schedule.first: 0"),
    ),
    "boundary alone under ddp": (
        {"trainer__strategy": "ddp", "model__objective": [{"class_path": "Boundary"}]},
        ("Boundary", "add Logits", "ddp_find_unused_parameters_true"),
    ),
    "strategy that cannot merge": ({"trainer__strategy": "fsdp"}, ("fsdp",)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_mistake_in_a_recipe_is_one_sentence_and_leaves_nothing(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    changes, expected = RECIPES[name]
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", **changes)
    monkeypatch.setattr("lcprune.distillation.module.load_pair", _never)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 2
    sentence = _sentence(capsys)
    assert all(part in sentence for part in expected), sentence
    assert not (tmp_path / "run" / "student").exists()
    assert not list((tmp_path / "run").rglob("*.ckpt")) if (tmp_path / "run").exists() else True


def test_student_that_is_no_student_is_one_sentence_before_weights_are_loaded(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcprune.distillation.module.load_pair", _never)
    for wrong in (tmp_path / "nowhere", tiny_folder):
        content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", model__student=str(wrong))
        assert main(["fit", "--config", str(write(tmp_path, content))]) == 2
        assert "holds no history.json: name a folder that lcprune collapse" in _sentence(capsys)


def _never(*args: object) -> None:
    pytest.fail("weights were loaded before the mistake was found")


COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown command": (["fitt"], ("'fitt'", "did you mean fit")),
    "missing recipe": (["fit", "--config", "nowhere.yaml"], ("nowhere.yaml", "does not exist", "check the path")),
    "option cut short": (["fit", "--model.objectiv", "Logits"], ("'model.objectiv'", "did you mean model.objective?")),
    "misspelt option": (["fit", "--trainer.max_stepz", "3"], ("max_stepz", "did you mean")),
    "collapse without out": (["collapse", "--config", "x.yaml"], ("--out", "missing")),
    "missing plan": (["collapse", "--config", "x.yaml", "--plan", "nowhere.json", "--out", "o"], ("nowhere.json",)),
    "plan and plan-only": (["collapse", "--plan-only", "--plan", "PLAN"], ("--plan-only", "one of them")),
    "export of nothing": (["export", "nowhere.ckpt", "--out", "o"], ("nowhere.ckpt", "does not exist")),
    "export without out": (["export", "x.ckpt"], ("--out",)),
    "fit without a recipe": (["fit"], ("needs a recipe", "quickstart.yaml")),
    "text for a depth": (["collapse", "--target-depth", "abc", "--out", "o"], ("--target-depth", "abc")),
    "option without a value": (["collapse", "--out"], ("--out",)),
    "plan and depth": (["collapse", "--plan", "PLAN", "--target-depth", "4", "--out", "o"], ("give one of them",)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_mistake_on_the_command_line_is_one_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    arguments, expected = COMMANDS[name]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format": 1, "teacher_depth": 6, "steps": []}))
    monkeypatch.chdir(tmp_path)
    assert main([str(plan) if argument == "PLAN" else argument for argument in arguments]) == 2
    sentence = _sentence(capsys)
    assert all(part in sentence for part in expected), sentence
    assert list(tmp_path.iterdir()) == [plan]


@pytest.mark.parametrize("target", [0, 6, 7])
def test_collapse_to_an_impossible_depth_is_refused(
    target: int, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    out = tmp_path / "short"
    assert main(["collapse", "--config", str(config), "--target-depth", str(target), "--out", str(out)]) == 2
    assert f"target_depth={target} must lie between 1 and 5" in _sentence(capsys)
    assert not out.exists()


def _of_another_model(good: Path, path: Path) -> None:
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["lcprune"]["fingerprint"]["hidden_size"] = 4096
    torch.save(checkpoint, path)


def _foreign(good: Path, path: Path) -> None:
    torch.save({"state_dict": {}}, path)


def _truncated(good: Path, path: Path) -> None:
    path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = write(folder, recipe(tiny_folder, text_file(folder), folder / "run"))
    assert main(["fit", "--config", str(config)]) == 0
    return folder / "run" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [(_of_another_model, "another model"), (_foreign, "did not write"), (_truncated, "not a whole checkpoint")],
)
def test_checkpoint_that_does_not_fit_is_refused_before_weights_are_loaded(
    spoil: Callable[[Path, Path], None],
    expected: str,
    checkpoint: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    spoil(checkpoint, tmp_path / "bad.ckpt")
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    monkeypatch.setattr("lcprune.distillation.module.load_pair", _never)
    assert main(["fit", "--config", str(config), "--ckpt_path", str(tmp_path / "bad.ckpt")]) == 2
    assert expected in _sentence(capsys)
    assert not (tmp_path / "run" / "student").exists()


def test_out_of_a_command_that_exports_nothing_is_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    assert main(["validate", "--config", str(config), "--out", str(tmp_path / "x")]) == 2
    assert "validate exports none" in _sentence(capsys)


def test_plan_of_another_model_is_refused(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format": 1, "teacher": "somebody/else", "teacher_depth": 6, "steps": []}))
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    assert main(["collapse", "--config", str(config), "--plan", str(plan), "--out", str(tmp_path / "short")]) == 2
    assert "somebody/else" in _sentence(capsys)


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
