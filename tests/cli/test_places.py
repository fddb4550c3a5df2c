"""A local folder by whichever name it is called, from whichever folder."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lcprune.cli import main
from lcprune.merging.lineage import MergeHistory
from tests.cli.recipe import recipe, text_file, write

pytestmark = pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")


def test_what_was_made_with_a_relative_name_is_of_use_from_everywhere(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    teacher = Path(shutil.copytree(tiny_folder, tmp_path / "m" / "llama"))
    config = str(write(tmp_path, recipe(Path("m/llama"), text_file(tmp_path), tmp_path / "run")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["collapse", "--config", config, "--plan-only", "--out", str(tmp_path / "plan.json")]) == 0
    assert main(["fit", "--config", config]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    run, last = tmp_path / "run", str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert MergeHistory.load(run / "student" / "history.json").teacher == str(teacher)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["teacher"] == str(teacher)
    assert main(["evaluate", str(run), "--limit", "1"]) == 0
    assert main(["fit", "--config", str(run / "recipe.yaml"), "--ckpt_path", last, "--trainer.max_steps", "7"]) == 0
    plan = ["--plan", str(tmp_path / "plan.json"), "--out", "planned"]
    assert main(["collapse", "--config", config, "--model.teacher", "../m/llama", *plan]) == 0
    teacher.rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["export", last, "--out", "short"]) == 2
    assert "does not exist" in (said := capsys.readouterr().err)
    assert "If it has moved, say where to: --teacher." in said
    assert main(["export", last, "--out", "short", "--teacher", "../moved"]) == 0
    assert MergeHistory.load(Path("short") / "history.json").teacher == str(tmp_path / "moved")


def test_plan_that_names_the_same_teacher_otherwise_is_executed(
    config: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = tmp_path / "plan.json"
    assert main(["collapse", "--config", config, "--plan-only", "--out", str(plan)]) == 0
    told = {**json.loads(plan.read_text()), "teacher": f"../{tiny_folder.parent.name}/{tiny_folder.name}"}
    plan.write_text(json.dumps(told))
    monkeypatch.chdir(tiny_folder.parent)
    assert main(["collapse", "--config", config, "--plan", str(plan), "--out", str(tmp_path / "short")]) == 0
