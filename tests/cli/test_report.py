"""`lcprune report` on runs of a tiny model: whole, unfinished, begun from a student, never trained; and mistakes."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from lcprune.cli import main
from lcprune.delivery import training_log
from tests.builders import save_tiny, tiny_llama
from tests.cli.recipe import recipe, text_file, write
from tests.delivery import run_folders
from tests.delivery.test_report import Elements
from tests.marks import slow

pytestmark = pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")

THIN = ("--samples", "0", "--blocks", "0")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def text_of(run: Path) -> str:
    return Elements((run / "report.html").read_text(encoding="utf-8")).text


def test_report_of_a_finished_run_misses_nothing(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(run), "--samples", "2", "--blocks", "3"]) == 0
    shown = capsys.readouterr().out
    assert "not in the report" not in shown
    assert f"report: {run / 'report.html'} and 8 pictures beside it" in shown
    text = text_of(run)
    assert "Not in this report" not in text
    for part in ("Family tree", "Training", "Figures", "layer by layer", "in common", "Generated text", "Recipe"):
        assert part in text
    assert "merged, not trained" in text
    assert "over 96 tokens" in text
    assert f"lcprune fit --config {run / 'recipe.yaml'}" in text


def test_report_without_samples_and_blocks_loads_no_weights(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lcprune.cli.reporting.load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    assert main(["report", str(run), *THIN]) == 0
    assert "Generated text" not in text_of(run)


def test_report_of_an_unfinished_run_takes_the_history_of_its_checkpoint(run: Path):
    shutil.rmtree(run / "student")
    (run / "figures.json").unlink()
    assert main(["report", str(run)]) == 0
    text = text_of(run)
    assert "6 \N{RIGHTWARDS ARROW} 4 layers" in text
    assert "it has not finished, the family tree is that of its checkpoint last.ckpt" in text
    assert f"lcprune export {run / 'checkpoints' / 'last.ckpt'} --out {run / 'student'}" in text


def test_report_of_a_run_whose_teacher_is_gone_says_so(run: Path):
    saved = (run / "recipe.yaml").read_text()
    teacher = next(line for line in saved.splitlines() if line.startswith("  teacher: "))
    (run / "recipe.yaml").write_text(saved.replace(teacher, "  teacher: ./nowhere"))
    assert main(["report", str(run)]) == 0
    assert "'./nowhere' looks like a local path but does not exist" in text_of(run)


def test_report_of_a_run_whose_teacher_has_become_another_says_so(run: Path, tmp_path: Path):
    saved = (run / "recipe.yaml").read_text()
    teacher = next(line for line in saved.splitlines() if line.startswith("  teacher: "))
    other = save_tiny(tmp_path / "other", tiny_llama(3))
    (run / "recipe.yaml").write_text(saved.replace(teacher, f"  teacher: {other}"))
    assert main(["report", str(run)]) == 0
    assert f"{other} has 3 layers, the student's original had 6" in text_of(run)


def test_report_of_a_run_whose_text_is_gone_says_so(run: Path):
    saved = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(saved.replace("text.txt", "elsewhere.txt"))
    assert main(["report", str(run)]) == 0
    assert "elsewhere.txt" in text_of(run).partition("Family tree")[0]


def test_report_says_how_to_run_again_from_the_start_and_into_another_folder(run: Path):
    saved = (run / "recipe.yaml").read_text()
    changed = saved.replace("\nckpt_path: null", "\nckpt_path: last").replace(
        "\nout: null", f"\nout: {run / 'student'}"
    )
    assert changed.count("\n") == saved.count("\n")
    (run / "recipe.yaml").write_text(changed)
    assert main(["report", str(run), *THIN]) == 0
    assert f"lcprune fit --config {run / 'recipe.yaml'} --trainer.default_root_dir again" in text_of(run)
    assert "--out again/student --ckpt_path null" in text_of(run)


def test_report_of_what_fit_has_exported_says_fit(run: Path):
    assert main(["report", str(run / "student"), *THIN]) == 0
    assert "lcprune fit --config" in text_of(run / "student")


def test_report_of_a_run_that_began_with_a_student_compares_with_it(finished: Path, tiny_folder: Path, tmp_path: Path):
    changes = {"collapse__schedule": None, "trainer__max_steps": 2, "model__student": str(finished / "run" / "student")}
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", **changes)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    assert main(["report", str(tmp_path / "run"), "--samples", "0"]) == 0
    text = text_of(tmp_path / "run")
    assert "Not in this report" not in text
    assert "merged: no training, 4 layers left" in text
    assert "merged, not trained" in text


def _again(page: Path) -> list[str]:
    """The command that a report names, without `lcprune`."""
    lines = Elements(page.read_text(encoding="utf-8")).text.splitlines()
    return shlex.split(next(line for line in lines if line.startswith(("lcprune fit", "lcprune collapse"))))[1:]


@pytest.mark.parametrize("reported", ["elsewhere", *slow("run")])
def test_resumed_run_with_its_export_elsewhere_is_made_again_from_its_beginning(
    reported: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), Path("run")))
    fit = ["fit", "--config", str(config), "--out", "elsewhere"]
    assert main(fit) == 0
    assert main([*fit, "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_steps", "8"]) == 0
    assert main(["report", reported, *THIN]) == 0
    before = {path: path.stat().st_mtime_ns for name in ("run", "elsewhere") for path in Path(name).rglob("*")}
    assert main(_again(tmp_path / reported / "report.html")) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    log = training_log.read(Path("again"))
    assert [step for step, _ in log.points("train/loss")] == list(range(1, 9))
    assert Path("again/student/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("path", "added"),
    [
        ("null", []),
        ("last", ["--ckpt_path", "null"]),
        ("{run}/checkpoints/step=3.ckpt", ["--ckpt_path", "null"]),
        ("short.ckpt", []),
    ],
)
def test_run_that_began_with_another_commands_checkpoint_begins_with_it_again(
    path: str, added: list[str], tmp_path: Path
):
    run = tmp_path / "run"
    loggers = "[{class_path: CSVLogger, init_args: {save_dir: x, name: a}}, {class_path: Mine}]"
    text = f"ckpt_path: {path.format(run=run)}\ntrainer: {{logger: {loggers}}}\n"
    run_folders.write(run, recipe__yaml=text)
    assert main(["report", str(run), *THIN]) == 0
    command = _again(run / "report.html")
    assert command[: len(command) - len(added)][-2] == "--trainer.logger"
    assert json.loads(command[6])[0]["init_args"] == {"save_dir": "again", "name": "a"}
    assert command[7:] == added


def test_report_of_a_collapsed_model_needs_no_training(tiny_folder: Path, tmp_path: Path):
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    short = tmp_path / "short"
    assert main(["collapse", "--config", str(config), "--target-depth", "4", "--out", str(short)]) == 0
    assert main(["report", str(short), "--samples", "1"]) == 0
    text = text_of(short)
    assert "no metrics in metrics.csv" in text
    assert "Generated text" in text
    assert f"lcprune collapse --config {short / 'recipe.yaml'} --plan {short / 'history.json'} --out again" in text


def test_several_runs_go_into_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders = [str(run_folders.write(tmp_path / name)) for name in ("a", "b")]
    assert main(["report", *folders, *THIN, "--out", str(tmp_path / "new" / "both.html")]) == 0
    assert "2 runs compared" in (tmp_path / "new" / "both.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: RUN"),
        (["nowhere"], "nowhere is no run: name a folder that lcprune fit"),
        (["{run}", "--out", "report.pdf"], "--out report.pdf must be a file ending in .html"),
        (["{run}", "--samples", "-1"], "--samples -1 must be 0 or more"),
        (["{run}", "--blocks", "-1"], "--blocks -1 must be 0 or more"),
        (["{run}", "--dtype", "int3"], "--dtype int3 must be one of float32"),
        (["{run}", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistake_ends_in_one_sentence_and_writes_nothing(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = run_folders.write(tmp_path / "run")
    before = sorted(run.iterdir())
    assert main(["report", *(each.format(run=run) for each in arguments)]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert sorted(run.iterdir()) == before
