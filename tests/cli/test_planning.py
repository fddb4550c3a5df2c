"""`lcprune plan`: what is printed, for people and for programs, with nothing loaded and nothing left behind."""

import json
from pathlib import Path

import pytest

from lcprune.cli import main
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
