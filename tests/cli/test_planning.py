"""`lcprune plan`: what is printed, for people and for programs, with nothing loaded and nothing left behind."""

import json
from pathlib import Path

import pytest

from lcprune.cli import main
from lcprune.cli.machines import OneDevice
from tests.builders import tiny_config
from tests.cli.recipe import recipe, write

pytestmark = pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A recipe whose model is a config, and whose text is shorter than a block."""
    tiny_config().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("less than a block")
    return str(write(tmp_path, recipe(tmp_path / "model", tmp_path / "text.txt", tmp_path / "run")))


def test_plan_prints_depths_phases_and_memory(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--config", config]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # long lines are wrapped
    for words in (
        "6 layers",
        "depth over time",
        "Logits + Boundary",
        "0 to 6",
        "activations: recompute",
        "with teacher_cache",
        "128 tokens a step, 768 in 6 steps",
        "not counted: libraries",
    ):
        assert words in shown
    assert "hours" not in shown
    assert not (tmp_path / "run").exists()


def test_plan_for_programs_is_one_json_object(config: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--config", config, "--json", "--tflops", "2"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [(stage["step"], stage["depth"]) for stage in content["stages"]] == [(0, 5), (3, 4)]
    assert content["tokens"] == 768
    assert content["peak_memory"] == sum(content["stages"][0]["memory"].values())
    assert content["seconds"] == pytest.approx(content["flops"] / 2e12)


def test_plan_of_a_packed_student_says_what_a_merge_takes_more(config: str, capsys: pytest.CaptureFixture[str]):
    packed = ["--model.train", "lora", "--model.lora.base", "nf4", "--model.teacher_dtype", "nf4"]
    assert main(["plan", "--config", config, *packed]) == 0
    assert "the student is whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--collapse.schedule.target_depth", "9"], "must lie between 1 and 5"),
        (["--tflops", "none"], "'none' must be a number above 0"),
        (["--model.teacher", "./nowhere"], "./nowhere"),
    ],
)
def test_plan_mistake_is_one_sentence(
    arguments: list[str], words: str, config: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", "--config", config, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_plan_of_more_devices_than_there_are_reckons_with_all_of_them(config: str, capsys: pytest.CaptureFixture[str]):
    for devices in ("8", "[0,1,2,3,4,5,6,7]"):
        more = ["--trainer.accelerator", "cuda", "--trainer.devices", devices, "--trainer.strategy", "ddp"]
        assert main(["plan", "--config", config, "--json", *more]) == 0
        assert json.loads(capsys.readouterr().out)["tokens_per_step"] == 8 * 128


def test_command_that_does_not_train_takes_one_device_of_many(config: str):
    more = ["--trainer.devices", "8", "--trainer.num_nodes", "2", "--trainer.strategy", "ddp"]
    trainer = OneDevice(["--config", config, *more]).trainer
    assert (trainer.world_size, type(trainer.strategy).__name__) == (1, "SingleDeviceStrategy")


@pytest.mark.parametrize(("accelerator", "device"), [("cuda", None), ("cuda", "cpu"), ("gpu", None), ("cpu", None)])
def test_command_that_does_not_train_takes_a_device_that_is_here(
    accelerator: str, device: str | None, config: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    trainer = OneDevice(["--config", config, "--trainer.accelerator", accelerator], device).trainer
    assert trainer.strategy.root_device.type == "cpu"
