"""`lcprune collapse-checkpoint` as a user types it: what it writes, how fit goes on, and every wrong input."""

import errno
import json
import os
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from lcprune.cli import main
from lcprune.distillation.checkpoint import read
from lcprune.merging.lineage import MergeHistory
from tests.cli.recipe import recipe, text_file, write

pytestmark = pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml, without merges, and run/checkpoints/last.ckpt of its third step; read only."""
    folder = tmp_path_factory.mktemp("unmerged")
    content = recipe(tiny_folder, text_file(folder), folder / "run", trainer__max_steps=3, collapse__schedule=None)
    path = write(folder, content)
    assert main(["fit", "--config", str(path), "--out", str(folder / "student")]) == 0
    return folder


def command(run: Path, out: Path, *options: str, source: str = "run/checkpoints/last.ckpt") -> list[str]:
    return ["collapse-checkpoint", str(run / source), str(out), "--config", str(run / "recipe.yaml"), *options]


def test_checkpoint_becomes_shorter_and_fit_goes_on_from_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, before = tmp_path / "short.ckpt", {path.name for path in (run / "run").iterdir()}
    assert main(command(run, out, "--target-depth", "4")) == 0
    said = capsys.readouterr().out
    assert f"{out}: 6 layers -> 4, after optimizer step 3" in said
    assert f"--ckpt_path {out}" in said
    assert {path.name for path in (run / "run").iterdir()} == before  # the run folder is left alone
    assert [path.name for path in tmp_path.iterdir()] == ["short.ckpt"]
    assert [step.global_step for step in read(out).history.steps] == [3] * len(read(out).history.steps)
    assert all("val/perplexity" in step.measured for step in read(out).history.steps[-1:])
    student = tmp_path / "student"
    root = ["--trainer.default_root_dir", str(tmp_path / "on"), "--trainer.max_steps", "5", "--trainer.logger", "false"]
    fit = ["fit", "--config", str(run / "recipe.yaml"), "--ckpt_path", str(out), "--out", str(student), *root]
    assert main(fit) == 0
    assert MergeHistory.load(student / "history.json").depth == 4


def test_plan_is_executed_as_it_is_written(run: Path, tmp_path: Path):
    plan = {"format": 1, "teacher_depth": 6, "steps": [{"group": [1, 2, 3], "operator": {"class_path": "Drop"}}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert main(command(run, tmp_path / "short.ckpt", "--plan", str(tmp_path / "plan.json"))) == 0
    assert read(tmp_path / "short.ckpt").history.lineage == ((0,), (1, 2, 3), (4,), (5,))


WRONG: dict[str, tuple[dict[str, str], list[str], tuple[str, ...]]] = {
    "no such checkpoint": ({"source": "nowhere.ckpt"}, ["--target-depth", "4"], ("nowhere.ckpt", "does not exist")),
    "no checkpoint": ({"source": "recipe.yaml"}, ["--target-depth", "4"], ("recipe.yaml", "not a whole checkpoint")),
    "as deep as it is": ({}, ["--target-depth", "6"], ("target_depth=6", "5")),
    "nothing said": ({}, [], ("How short?", "--target-depth", "--plan")),
    "plan and depth": ({}, ["--plan", "PLAN", "--target-depth", "4"], ("--plan", "give one of them")),
    "plan for another depth": ({}, ["--plan", "PLAN"], ("The plan is for a model of 9 layers", "teacher_depth: 6")),
    "missing plan": ({}, ["--plan", "nowhere.json"], ("nowhere.json", "cannot be read")),
    "other teacher": ({}, ["--target-depth", "4", "--model.teacher", "OTHER"], ("another model", "name the model")),
    "adapters it has not": ({}, ["--target-depth", "4", "--model.train", "lora"], ("adapters are none",)),
    "no such device": ({}, ["--target-depth", "4", "--device", "cuda:77"], ("--device cuda:77", "cpu")),
    "optimizer of no use": ({}, ["--target-depth", "4", "--model.optimizer", "NAdam"], ("NAdam", "starts at zero")),
    "layers it has not": (
        {},
        ["--target-depth", "4", "--collapse.planner", "FixedPlan", "--collapse.planner.groups", "[[5,6,7]]"],
        ("layer 7", "0 to 5"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistake_is_one_sentence_before_weights_are_loaded_and_leaves_nothing(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from tests.builders import save_tiny, tiny_llama

    source, options, expected = WRONG[name]
    (tmp_path / "plan.json").write_text(
        json.dumps({"format": 1, "teacher_depth": 9, "steps": [{"group": [1, 2], "operator": {"class_path": "Drop"}}]})
    )
    other = str(save_tiny(tmp_path / "other", tiny_llama(5))) if "OTHER" in options else ""
    options = [{"PLAN": str(tmp_path / "plan.json"), "OTHER": other}.get(option, option) for option in options]
    monkeypatch.setattr("lcprune.distillation.resumable.load_pair", lambda *_: pytest.fail("weights were loaded"))
    assert main(command(run, tmp_path / "out" / "short.ckpt", *options, **source)) == 2
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("lcprune: ")
    assert "\n" not in sentence
    assert all(part in sentence for part in expected), sentence
    assert not (tmp_path / "out").exists()


def test_out_that_is_there_or_not_named_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.ckpt").write_text("mine")
    assert main(command(run, tmp_path / "mine.ckpt", "--target-depth", "4")) == 2
    assert "mine.ckpt exists" in capsys.readouterr().err
    assert (tmp_path / "mine.ckpt").read_text() == "mine"
    assert main(["collapse-checkpoint", "--config", str(run / "recipe.yaml"), "a.ckpt", "b.ckpt"]) == 2
    assert "before any option" in capsys.readouterr().err


def test_full_disk_leaves_nothing_behind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(content: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    assert main(command(run, tmp_path / "short.ckpt", "--target-depth", "5")) == 1
    assert "short.ckpt cannot be written (No space left on device)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
