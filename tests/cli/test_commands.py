"""The command line end to end on a tiny model: what a user types, and what lies on the disk afterwards."""

import csv
import json
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lcprune import cli
from lcprune.cli import main
from lcprune.cli.bars import TrainingBar
from lcprune.cli.quiet import quieten
from lcprune.cli.training import RecipeCLI
from lcprune.merging.lineage import MergeHistory
from tests.builders import save_tiny, tiny_llama
from tests.cli.recipe import recipe, text_file, write
from tests.processes import python

pytestmark = pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")


def test_fit_exports_a_student_of_the_target_depth(finished: Path):
    student = AutoModelForCausalLM.from_pretrained(finished / "run" / "student")
    assert len(student.model.layers) == student.config.num_hidden_layers == 4


@pytest.mark.slow  # tests/delivery/test_export.py loads without lcprune, too
def test_exported_student_generates_without_lcprune(finished: Path):
    folder = str(finished / "run" / "student")
    code = (
        "import sys; sys.modules['lcprune'] = None\n"
        "from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
        f"m, t = A.from_pretrained({folder!r}), T.from_pretrained({folder!r})\n"
        "print(m.generate(**t('layer', return_tensors='pt'), max_new_tokens=5, use_cache=True).shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 5


def test_fit_leaves_the_run_folder_that_the_readme_promises(finished: Path):
    run = finished / "run"
    names = {path.name for path in run.iterdir()}
    assert {"student", "recipe.yaml", "metrics.csv", "figures.json", "checkpoints"} <= names
    history = MergeHistory.load(run / "student" / "history.json")
    assert (history.teacher_depth, history.depth) == (6, 4)
    assert [step.global_step for step in history.steps] == [0, 3]
    assert all("val/perplexity" in step.measured for step in history.steps)


def test_fit_logs_the_metrics_by_their_names(finished: Path):
    with (finished / "run" / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames or ())
    assert {"train/loss", "train/logits", "train/boundary", "depth"} <= columns
    assert {"val/perplexity_after_merge", "val/agreement_after_merge"} <= columns


def test_saved_recipe_is_one_that_fit_accepts(finished: Path, tmp_path: Path):
    saved = finished / "run" / "recipe.yaml"
    out = tmp_path / "again"
    moved = ["--trainer.default_root_dir", str(tmp_path), "--trainer.logger.init_args.save_dir", str(tmp_path)]
    assert main(["fit", "--config", str(saved), "--out", str(out), *moved]) == 0
    first = AutoModelForCausalLM.from_pretrained(finished / "run" / "student").state_dict()
    again = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_closing_table_names_teacher_merges_and_student(finished: Path, capsys: pytest.CaptureFixture[str]):
    figures = json.loads((finished / "run" / "figures.json").read_text())
    assert figures["teacher"]["layers"] == 6
    assert figures["student"]["layers"] == 4
    assert figures["student"]["parameters"] < figures["teacher"]["parameters"]
    assert figures["student"]["bytes"] > 0
    assert min(figures["speed"].values()) > 0
    assert {"val/perplexity", "val/teacher_perplexity", "val/agreement"} <= figures["final"].keys()


def test_export_makes_of_the_last_checkpoint_what_fit_exported(finished: Path, tmp_path: Path):
    checkpoint = finished / "run" / "checkpoints" / "last.ckpt"
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "short")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "short").state_dict()
    fitted = AutoModelForCausalLM.from_pretrained(finished / "run" / "student").state_dict()
    assert exported.keys() == fitted.keys()
    assert all(torch.equal(exported[name], fitted[name]) for name in fitted)


def test_export_of_a_checkpoint_named_from_its_own_folder_finds_the_runs_recipe(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(finished / "run" / "checkpoints")
    assert main(["export", "last.ckpt", "--out", str(tmp_path / "short")]) == 0
    assert (tmp_path / "short" / "recipe.yaml").read_text() == (finished / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], ""),
        (["--collapse.refit", "MagnitudeCompensation"], "it has no refit, and the recipe's MagnitudeCompensation is"),
        (
            ["--collapse.operator", "WeightedAverage"],
            "it merges with Drop, and the recipe's WeightedAverage is not run",
        ),
        (["--collapse.operator", "null"], ""),
    ],
)
def test_plan_says_what_of_the_recipe_it_passes_over(
    changes: list[str], said: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plan = str(tmp_path / "plan.json")
    assert main(["collapse", "--config", config, "--plan-only", "--out", plan]) == 0
    capsys.readouterr()
    out = tmp_path / "short"
    assert main(["collapse", "--config", config, *changes, "--plan", plan, "--out", str(out)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lcprune: ")]
    assert len(lines) == bool(said)
    assert not said or said in lines[0]
    assert not said or lines[0].endswith("put it into the plan's steps.")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_student_of_a_checkpoint_is_stored_in_the_dtype_of_its_teacher(tmp_path: Path, precision: str):
    teacher = save_tiny(tmp_path / "bf16", tiny_llama(dtype=torch.bfloat16))
    content = recipe(teacher, text_file(tmp_path), tmp_path / "run", trainer__precision=precision)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert main(["export", last, "--out", str(tmp_path / "short")]) == 0
    stored, exported = (load_file(tmp_path / place / "model.safetensors") for place in ("run/student", "short"))
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    assert all(torch.equal(exported[name], tensor) for name, tensor in stored.items())


def test_student_writes_conversations_as_it_has_learned_to(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}")
    rows = [{"prompt": f"layer {number}", "response": f"merge {number} " * 8} for number in range(40)]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = recipe(tiny_folder, chat, tmp_path / "run", data__chat_template=str(template))
    said, deliver = template.read_text(), RecipeCLI.after_fit

    def edited_meanwhile(*given: object) -> None:
        template.unlink()
        deliver(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(RecipeCLI, "after_fit", edited_meanwhile)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert main(["export", last, "--out", str(tmp_path / "short")]) == 0
    for place in ("run/student", "short"):
        assert AutoTokenizer.from_pretrained(tmp_path / place).chat_template == said
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == said


def test_collapse_does_not_replace_its_own_teacher(config: str, tiny_folder: Path, tmp_path: Path):
    teacher = Path(shutil.copytree(tiny_folder, tmp_path / "teacher"))
    (teacher / "history.json").write_text(MergeHistory(6).to_json())
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    for spelled in (teacher, f"{teacher}/"):
        arguments = ["--config", config, "--model.teacher", str(spelled), "--out", str(teacher)]
        assert main(["collapse", *arguments]) == 2
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before


@pytest.mark.parametrize("setting", ["model.teacher", "model.student"])
def test_earlier_export_stays_that_holds_what_the_next_is_made_of(
    setting: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "short"
    assert main(["collapse", "--config", config, "--out", str(out)]) == 0
    collapse = ["collapse", "--config", config, "--out", str(out), f"--{setting}"]
    assert main([*collapse, str(out)]) == 2
    assert f"holds {setting}={out}, which stays as it is" in capsys.readouterr().err
    inner = Path(shutil.copytree(out, out / "checkpoint-500"))
    assert main([*collapse, str(inner)]) == 2
    assert f"{out} exists and holds checkpoint-500, which no export has written" in capsys.readouterr().err
    assert (inner / "model.safetensors").is_file()


def test_run_that_a_logger_keeps_elsewhere_says_where(tiny_folder: Path, tmp_path: Path):
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", trainer__max_steps=4)
    content["trainer"]["default_root_dir"] = str(tmp_path / "moved")  # type: ignore[index]
    with pytest.warns(UserWarning, match=r"kept in .*run, where trainer\.logger writes, .* the logger's save_dir, too"):
        assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    assert (tmp_path / "run" / "student").is_dir()


def test_validation_interval_longer_than_an_epoch_is_one_sentence(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", trainer__val_check_interval=1000)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 2
    said = capsys.readouterr().err
    assert "trainer.val_check_interval=1000 is more than the" in said
    assert "Traceback" not in said
    content = recipe(
        tiny_folder, text_file(tmp_path), tmp_path / "run",
        trainer__val_check_interval=1000, trainer__check_val_every_n_epoch=None,
    )  # fmt: skip
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0


def test_validate_of_a_checkpoint_gives_the_final_perplexity(
    finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    checkpoint = finished / "run" / "checkpoints" / "last.ckpt"
    run = tmp_path / "validate"
    content = recipe(
        Path(yaml.safe_load((finished / "recipe.yaml").read_text())["model"]["teacher"]), finished / "text.txt", run
    )
    assert main(["validate", "--config", str(write(tmp_path, content)), "--ckpt_path", str(checkpoint)]) == 0
    with (run / "validate.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    final = json.loads((finished / "run" / "figures.json").read_text())["final"]
    assert float(row["val/perplexity"]) == pytest.approx(final["val/perplexity"], rel=1e-5)


def test_predict_writes_a_continuation_per_block(finished: Path, tiny_folder: Path, tmp_path: Path):
    checkpoint = finished / "run" / "checkpoints" / "last.ckpt"
    config = write(tmp_path, recipe(tiny_folder, finished / "text.txt", tmp_path / "run"))
    assert main(["predict", "--config", str(config), "--ckpt_path", str(checkpoint)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["prompt"] for row in rows)


def test_plan_only_prints_and_writes_a_plan_and_touches_nothing_else(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plan = tmp_path / "plans" / "plan.json"
    assert main(["collapse", "--config", config, "--plan-only", "--out", str(plan)]) == 0
    history = MergeHistory.load(plan)
    assert (history.teacher_depth, history.depth) == (6, 4)
    assert "6 layers -> 4" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_edited_plan_is_executed_as_edited(config: str, tmp_path: Path):
    plan, out = tmp_path / "plan.json", tmp_path / "short"
    assert main(["collapse", "--config", config, "--plan-only", "--out", str(plan)]) == 0
    content = json.loads(plan.read_text())
    content["steps"] = [{"group": [2, 3, 4], "operator": {"class_path": "Drop", "init_args": {"keep": "last"}}}]
    plan.write_text(json.dumps(content))
    assert main(["collapse", "--config", config, "--plan", str(plan), "--out", str(out)]) == 0
    assert MergeHistory.load(out / "history.json").lineage == ((0,), (1,), (2, 3, 4), (5,))
    teacher = yaml.safe_load(Path(config).read_text())["model"]["teacher"]
    original = AutoModelForCausalLM.from_pretrained(teacher).model.layers[4].state_dict()
    merged = AutoModelForCausalLM.from_pretrained(out).model.layers[2].state_dict()
    assert all(torch.equal(merged[name], original[name]) for name in original)


def test_collapse_without_training_reaches_the_target(config: str, tmp_path: Path):
    out = tmp_path / "short"
    assert main(["collapse", "--config", config, "--target-depth", "3", "--out", str(out)]) == 0
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3
    assert AutoTokenizer.from_pretrained(out)("layer").input_ids


def test_student_of_collapse_is_validated_distilled_and_shortened_further(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    short, run = tmp_path / "short", tmp_path / "run"
    assert main(["collapse", "--config", config, "--target-depth", "5", "--out", str(short)]) == 0
    begun = ["--config", config, "--model.student", str(short)]
    assert main(["validate", *begun]) == 0
    assert main(["fit", *begun, "--collapse.schedule", "null", "--out", str(tmp_path / "same")]) == 0
    assert main(["fit", *begun, "--out", str(tmp_path / "shorter")]) == 0
    depths = [MergeHistory.load(tmp_path / name / "history.json").depth for name in ("short", "same", "shorter")]
    assert depths == [5, 5, 4]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("short", "same")]
    assert not weights[0]["model.norm.weight"].equal(weights[1]["model.norm.weight"])
    assert run.is_dir()
    capsys.readouterr()
    assert main(["collapse", *begun, "--out", str(tmp_path / "o")]) == 2
    assert "model.student=" in capsys.readouterr().err


def test_student_is_stored_in_the_dtype_of_its_teacher(tmp_path: Path):
    teacher = save_tiny(tmp_path / "bf16", tiny_llama(dtype=torch.bfloat16))
    content = recipe(teacher, text_file(tmp_path), tmp_path / "run")
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").config
    assert config.dtype == torch.bfloat16
    assert config.use_cache


@pytest.mark.parametrize(("epochs", "said"), [(-1, "Epoch 3"), (5, "Epoch 3/4")])
def test_bar_names_no_last_epoch_where_there_is_none(epochs: int, said: str):
    bar = TrainingBar()
    bar._trainer = Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert bar._get_train_description(3).strip() == said


@pytest.mark.parametrize(("steps", "accumulate", "shown"), [(120, 1, 120), (120, 4, 209), (30, 4, 120), (-1, 1, 209)])
def test_bar_ends_where_the_run_does(steps: int, accumulate: int, shown: int):
    bar, common = TrainingBar(), {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    bar._trainer = Trainer(max_epochs=2, max_steps=steps, accumulate_grad_batches=accumulate, **common)
    bar._trainer.fit_loop.max_batches = 209
    assert bar.total_train_batches == shown


def test_single_callback_may_stand_without_a_list(tiny_folder: Path, tmp_path: Path):
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run")
    content["trainer"]["callbacks"] = content["trainer"]["callbacks"][0]  # type: ignore[index]
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0


def test_fit_on_two_processes_ends_with_one_export(tiny_folder: Path, tmp_path: Path):
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", trainer__devices=2, trainer__strategy="ddp")
    done = python("-m", "lcprune", "fit", "--config", write(tmp_path, content), cwd=tmp_path, timeout=200)
    assert MergeHistory.load(tmp_path / "run" / "student" / "history.json").depth == 4
    assert done.stdout.count("what became of it") == 1


def test_fit_without_schedule_trains_an_unmerged_student(tiny_folder: Path, tmp_path: Path):
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", collapse__schedule=None)
    content["model"]["objective"] = [{"class_path": "Labels"}]  # type: ignore[index]
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    assert MergeHistory.load(tmp_path / "run" / "student" / "history.json").steps == ()


def test_lightning_fit_is_lcprune_fit(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(cli, "_run", lambda command, arguments: seen.append((command, arguments)) or 0)
    monkeypatch.setattr(sys, "argv", ["lightning", "fit", "--config", "x.yaml"])
    assert cli.lightning_main() == 0
    assert seen == [("fit", ["--config", "x.yaml"])]


def test_lightning_with_another_command_needs_lightning_sdk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "lightning_sdk.cli.entrypoint", None)
    monkeypatch.setattr(sys, "argv", ["lightning", "login"])
    assert cli.lightning_main() == 2
    assert "lightning_sdk" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("fit", "validate", "test", "predict", "collapse", "score", "export"))


def test_warning_is_one_line_without_its_place_in_the_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    quieten()
    shown = warnings.formatwarning("no merge\n is due", UserWarning, "module.py", 3, "rank_zero_warn(")
    assert shown == "warning: no merge is due\n"


def test_nothing_is_said_of_what_checkpoints_hold():
    quieten()
    logger = logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector")
    said = "`weights_only` was not set, defaulting to `False`."
    assert not logger.filter(logger.makeRecord(logger.name, logging.INFO, __file__, 1, said, (), None))


def test_recipe_of_a_run_serves_the_commands_that_do_not_train(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    recipe = finished / "run" / "recipe.yaml"
    assert "ckpt_path" in recipe.read_text(encoding="utf-8")
    assert main(["plan", "--config", str(recipe)]) == 0
    assert main(["plan", "--config", recipe.read_text(encoding="utf-8")]) == 0
