"""What runs leave in a folder: an account and checkpoints of its own for each, whatever comes behind it."""

import shutil
from pathlib import Path

import pytest
from lightning.pytorch.loggers import Logger

from lcprune.cli import main
from lcprune.merging.lineage import MergeHistory
from tests.cli.recipe import recipe, text_file, write

pytestmark = pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")


def test_run_that_begins_anew_in_a_folder_puts_the_account_of_the_one_before_aside(
    finished: Path, tiny_folder: Path, tmp_path: Path
):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    (run / "metrics.1.csv").write_text("step\n1\n")
    (run / "evaluation.json").write_text("{}")
    before = {name: (run / name).read_bytes() for name in ("metrics.csv", "metrics.1.csv", "figures.json")}
    content = recipe(tiny_folder, finished / "text.txt", run, trainer__max_steps=4)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    assert {name: (run / "former.1" / name).read_bytes() for name in before} == before
    assert {path.name for path in (run / "former.1").iterdir()} == {*before, "evaluation.json", "checkpoints.json"}
    assert {path.name for path in run.glob("*.csv")} == {"metrics.csv"}
    assert not (run / "evaluation.json").exists()
    assert (run / "figures.json").read_bytes() != before["figures.json"]


class Elsewhere(Logger):
    """Keeps nothing in a folder, as MLFlowLogger does with a database."""

    name, version = "elsewhere", "1"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nothing is kept."""

    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        """Nothing is kept."""


def test_run_whose_logger_has_no_folder_is_kept_in_the_trainers(tiny_folder: Path, tmp_path: Path):
    logger = {"class_path": f"{__name__}.{Elsewhere.__name__}"}
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", trainer__logger=logger)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    assert {"recipe.yaml", "figures.json", "student"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_predictions_that_would_be_empty_are_refused(
    finished: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    (run / "predictions.jsonl").write_text("{}\n")
    config = str(write(tmp_path, recipe(tiny_folder, finished / "text.txt", run)))
    assert main(["predict", "--config", config, "--ckpt_path", "last", "--return_predictions", "false"]) == 2
    assert "lcprune: return_predictions=false keeps from predict what it writes: drop it." in capsys.readouterr().err
    assert (run / "predictions.jsonl").read_text() == "{}\n"


def test_trial_of_the_code_leaves_an_earlier_run_as_it_was(finished: Path, tiny_folder: Path, tmp_path: Path):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    shutil.copy(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "sigterm.ckpt")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    content = recipe(tiny_folder, finished / "text.txt", run, trainer__fast_dev_run=True)
    content["trainer"]["callbacks"][0]["init_args"]["enable_version_counter"] = False  # type: ignore[index]
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_mistake_in_the_text_leaves_an_earlier_run_as_it_was(
    finished: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    content = recipe(tiny_folder, finished / "text.txt", run, data__batch_size=4000)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 2
    assert "lower data.batch_size" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_averaged_student_stays_so_where_a_finished_run_is_started_again(tiny_folder: Path, tmp_path: Path):
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run")
    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
    content["trainer"]["callbacks"].append(average)  # type: ignore[index]
    config, weights = str(write(tmp_path, content)), tmp_path / "run" / "student" / "model.safetensors"
    assert main(["fit", "--config", config, "--model.optimizer.init_args.lr", "1e-2"]) == 0
    before = weights.read_bytes()
    again = ["fit", "--config", config, "--model.optimizer.init_args.lr", "1e-2", "--ckpt_path", "last"]
    assert main(again) == 0
    assert weights.read_bytes() == before


def test_job_that_slurm_has_queued_again_goes_on_with_its_own_account(
    finished: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    shutil.copy(run / "checkpoints" / "last.ckpt", run / "hpc_ckpt_1.ckpt")
    before = (run / "metrics.csv").read_text()
    names = {"NTASKS": 1, "JOB_NAME": "job", "JOB_ID": 7, "LOCALID": 0, "NODEID": 0, "PROCID": 0, "NTASKS_PER_NODE": 1}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    content = recipe(tiny_folder, finished / "text.txt", run, trainer__max_steps=8)
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    assert (run / "metrics.1.csv").read_text() == before
    assert not list(run.glob("former.*"))


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_checkpoint_of_slurm_is_found_by_name(command: str, finished: Path, tiny_folder: Path, tmp_path: Path):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    for number in (2, 10):  # ten is the newer one
        shutil.copy(run / "checkpoints" / "last.ckpt", run / f"hpc_ckpt_{number}.ckpt")
    (run / "hpc_ckpt_2.ckpt").write_bytes(b"")
    content = recipe(tiny_folder, finished / "text.txt", run, trainer__max_steps=8)
    assert main([command, "--config", str(write(tmp_path, content)), "--ckpt_path", "hpc"]) == 0


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("best", "ckpt_path=best finds no checkpoint here: name its file"),
        ("registry", "ckpt_path=registry finds no checkpoint here: name its file"),
        ("hpc", "ckpt_path=hpc: there is no hpc_ckpt_1.ckpt or later in"),
    ],
)
def test_name_that_leads_to_no_checkpoint_is_one_sentence_and_changes_nothing(
    name: str,
    words: str,
    command: str,
    finished: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    config = str(write(tmp_path, recipe(tiny_folder, finished / "text.txt", run)))
    assert main([command, "--config", config, "--ckpt_path", name]) == 2
    assert f"lcprune: {words}" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_metrics_from_before_a_resume_are_kept(finished: Path, tiny_folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    before = (run / "metrics.csv").read_text()
    content = recipe(tiny_folder, finished / "text.txt", run, trainer__max_steps=8)
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    assert main(["fit", "--config", str(write(tmp_path, content)), "--ckpt_path", checkpoint]) == 0
    assert (run / "metrics.1.csv").read_text() == before
    assert MergeHistory.load(run / "student" / "history.json").depth == 4


def test_validate_of_a_run_without_a_checkpoint_is_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    assert main(["validate", "--config", str(config), "--ckpt_path", "last"]) == 2
    assert "ckpt_path=last: there is no checkpoint yet in" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_what_a_run_has_left_is_not_overwritten_by_other_commands(
    command: str, finished: Path, tiny_folder: Path, tmp_path: Path
):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    config = str(write(tmp_path, recipe(tiny_folder, finished / "text.txt", run)))
    assert main([command, "--config", config, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    assert {name: (run / name).read_bytes() for name in before} == before
