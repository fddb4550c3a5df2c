"""`lcprune cache` as a user types it, and `fit` from what it leaves."""

import csv
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lcprune.cli import main
from lcprune.distillation.cache import Manifest, TeacherCache
from lcprune.distillation.teacher import Teacher
from tests.cli.recipe import recipe, text_file, write

pytestmark = pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")

FIXED = {"class_path": "FixedPlan", "init_args": {"groups": [[1, 2], [3, 4]]}}
LOGITS = [{"class_path": "Logits"}]


def written(folder: Path, model: Path, **changes: object) -> str:
    """The recipe's file, its merges named."""
    changes = {"collapse__planner": FIXED} | changes
    return str(write(folder, recipe(model, text_file(folder), folder / "run", **changes)))


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe and the cache made for it; read only."""
    folder = tmp_path_factory.mktemp("cache")
    file = written(folder, tiny_folder)
    assert main(["cache", "--config", file, "--out", str(folder / "teacher"), "--top-k", "7", "--states"]) == 0
    return file, folder / "teacher"


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lcprune: ")]
    assert len(lines) == 1
    return lines[0]


def test_cache_keeps_what_was_asked_for_and_the_states_that_the_merges_need(made: tuple[str, Path]):
    origin = Manifest.read(made[1]).origin
    assert (origin.top_k, origin.layers, origin.block_size, origin.dtype) == (7, (2, 4), 32, "float32")


def test_fit_from_a_cache_trains_and_exports(made: tuple[str, Path], tmp_path: Path):
    arguments = ["fit", "--config", made[0], "--model.teacher_cache", str(made[1]), "--out", str(tmp_path / "student")]
    arguments += ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.default_root_dir", str(tmp_path)]
    assert main(arguments) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.num_hidden_layers == 4
    with (tmp_path / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames or ())
    assert {"train/logits", "train/boundary"} <= columns


def test_size_and_progress_are_said_and_a_second_call_has_nothing_to_do(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file, out = written(tmp_path, tiny_folder), tmp_path / "teacher"
    assert main(["cache", "--config", file, "--out", str(out), "--layers", "2,4"]) == 0
    said = capsys.readouterr()
    assert "the likeliest 97 tokens and the states of layers 2, 4 at " in said.err
    assert "will take " in said.err
    assert "batches through the teacher: " in said.err
    assert f"cache: {out}" in said.out
    assert "of the teacher's probability" in said.out
    monkeypatch.setattr(Teacher, "__call__", lambda *_: pytest.fail("the teacher ran"))
    assert main(["cache", "--config", file, "--out", str(out), "--layers", "4,2"]) == 0
    assert "blocks are there already" in capsys.readouterr().err


def test_folder_may_stand_in_the_recipe(tiny_folder: Path, tmp_path: Path):
    file = written(tmp_path, tiny_folder, model__teacher_cache=str(tmp_path / "teacher"), model__objective=LOGITS)
    assert main(["cache", "--config", file]) == 0
    assert TeacherCache(tmp_path / "teacher").manifest.origin.layers == ()


def test_teacher_is_held_as_fit_would_hold_it(tiny_folder: Path, tmp_path: Path):
    file = written(tmp_path, tiny_folder, trainer__precision="bf16-mixed")
    for out, arguments in {"as in fit": [], "as asked": ["--dtype", "float32"]}.items():
        assert main(["cache", "--config", file, "--out", str(tmp_path / out), *arguments]) == 0
    assert Manifest.read(tmp_path / "as in fit").origin.dtype == "bfloat16"
    assert Manifest.read(tmp_path / "as asked").origin.dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, ["--top-k", "98"], ("--top-k 98", "97 tokens")),
        ({}, ["--top-k", "0"], ("--top-k 0", "between 1")),
        ({}, ["--layers", "3,6"], ("--layers 6", "0 to 5")),
        ({}, ["--layers", "a"], ("--layers", "3,7")),
        ({"collapse__planner": "OneShotRanking"}, ["--states"], ("OneShotRanking", "--layers", "FixedPlan")),
        ({"model__objective": LOGITS}, ["--states"], ("neither Boundary nor Local",)),
        ({"model__objective": [{"class_path": "Labels"}]}, [], ("[Labels]", "learns nothing")),
        (
            {"model__objective": [{"class_path": "Logits", "init_args": {"divergence": "jsd"}}]},
            [],
            ("divergence=jsd", "forward_kl"),
        ),
        ({}, ["--dtype", "int3"], ("--dtype int3", "float32")),
        ({}, ["--out", ""], ("--out",)),
    ],
)
def test_what_cannot_be_cached_is_said_in_one_sentence(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    arguments: list[str],
    words: tuple[str, ...],
):
    file = written(tmp_path, tiny_folder, **changes)
    assert main(["cache", "--config", file, "--out", str(tmp_path / "teacher"), *arguments]) == 2
    said = sentence(capsys)
    assert [word for word in words if word not in said] == []
    assert not (tmp_path / "teacher").exists()


def test_missing_folder_is_asked_for(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["cache", "--config", written(tmp_path, tiny_folder)]) == 2
    assert "--out is missing" in sentence(capsys)


def test_cache_that_is_not_there_leaves_no_run_folder(tiny_folder: Path, tmp_path: Path):
    file = written(tmp_path, tiny_folder)
    assert main(["fit", "--config", file, "--model.teacher_cache", str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.block_size", "16"], ("training blocks of 16 tokens", "of 32)")),
        (["--data.validation_fraction", "0.01"], ("lacks ", "training blocks of 32 tokens")),
        (
            ["--model.objective", json.dumps([{"class_path": "Logits", "init_args": {"temperature": 2}}])],
            ("forward_kl",),
        ),
        (["--model.objective+=Local"], ("states of teacher layers 0", "it has 2, 4")),
        (["--model.teacher_cache", "nowhere"], ("nowhere holds no manifest.json", "lcprune cache")),
    ],
)
def test_cache_that_does_not_fit_stops_fit_before_it_trains(
    made: tuple[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], words: tuple[str, ...]
):
    assert main(["fit", "--config", made[0], "--model.teacher_cache", str(made[1]), *arguments]) == 2
    said = sentence(capsys)
    assert [word for word in words if word not in said] == []
