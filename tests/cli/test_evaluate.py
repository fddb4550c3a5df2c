"""`lcprune evaluate` on tiny models: the run's own figures come back, table and JSON are there, mistakes come early."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lcprune.cli import main, measuring
from lcprune.delivery import speed
from tests.builders import save_tiny, tiny_llama
from tests.cli.recipe import recipe, text_file, write

pytestmark = pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")

QUESTIONS = [
    {"context": f"layer {number} is", "choices": ["merged", "a teacher of its own"], "label": number % 2}
    for number in range(6)
]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "WRITTEN", 8)
    monkeypatch.setattr(speed, "DECODED", 2)


def _fitted(folder: Path, teacher: Path, **changes: object) -> Path:
    content = recipe(teacher, text_file(folder), folder / "run", **changes)
    assert main(["fit", "--config", str(write(folder, content))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `lcprune fit`; evaluations write into it."""
    return _fitted(tmp_path_factory.mktemp("fit"), tiny_folder)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))
    return folder


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def _is_as_the_run_says(evaluation: dict, run: Path) -> bool:
    final = _json(run / "figures.json")["final"]
    return (
        evaluation["models"]["student"]["perplexity"],
        evaluation["models"]["teacher"]["perplexity"],
        evaluation["agreement"]["top1"],
    ) == (final["val/perplexity"], final["val/teacher_perplexity"], final["val/agreement"])


@pytest.mark.parametrize("below", ["", "student"])
def test_figures_of_the_text_are_those_of_the_runs_own_table(
    below: str, finished: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["evaluate", str(finished / below)]) == 0
    evaluation = _json(finished / below / "evaluation.json")
    assert _is_as_the_run_says(evaluation, finished)
    figures = _json(finished / "figures.json")
    for who in ("teacher", "student"):
        sizes = {name: evaluation["models"][who][name] for name in ("layers", "parameters", "bytes")}
        assert sizes == figures[who]
    shown = capsys.readouterr().out
    assert f"{figures['final']['val/perplexity']:.2f}" in shown
    assert f"evaluation: {finished / below / 'evaluation.json'}" in shown


@pytest.mark.parametrize("changes", [{"trainer__precision": "bf16-mixed"}, {"trainer__limit_val_batches": 1}])
def test_figures_are_those_of_the_run_in_its_precision_and_on_its_batches(
    changes: dict[str, object], tiny_folder: Path, tmp_path: Path
):
    run = _fitted(tmp_path, tiny_folder, **changes)
    assert main(["evaluate", str(run)]) == 0
    assert _is_as_the_run_says(_json(run / "evaluation.json"), run)
    alone = tmp_path / "alone.json"
    assert main(["evaluate", str(run), "--teacher", "none", "--out", str(alone)]) == 0
    final = _json(run / "figures.json")["final"]
    assert _json(alone)["models"]["student"]["perplexity"] == pytest.approx(final["val/perplexity"], rel=1e-6)
    assert main(["evaluate", str(run), "--dtype", "bfloat16", "--config", str(run / "recipe.yaml")]) == 0
    assert not _is_as_the_run_says(_json(run / "evaluation.json"), run) or "trainer__precision" not in changes


def test_collapsed_model_is_compared_with_its_teacher_on_its_recipes_text(tiny_folder: Path, tmp_path: Path):
    config, out = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run")), tmp_path / "short"
    assert main(["collapse", "--config", str(config), "--out", str(out)]) == 0
    assert main(["evaluate", str(out)]) == 0
    evaluation = _json(out / "evaluation.json")
    assert evaluation["models"]["teacher"]["name"] == str(tiny_folder)
    assert evaluation["settings"]["blocks"] == 5
    assert evaluation["agreement"]["top1"] < 1


def test_tasks_are_answered_by_both_and_limited(finished: Path, tasks: Path, tmp_path: Path):
    out = tmp_path / "e.json"
    arguments = ["evaluate", str(finished), "--task-folder", str(tasks), "--out", str(out)]
    assert main([*arguments, "--tasks", "two", "--limit", "4"]) == 0
    evaluation = _json(out)
    for model in evaluation["models"].values():
        assert model["tasks"]["two"].keys() == {"acc", "acc_norm", "rows", "stderr"}
        assert model["tasks"]["two"]["rows"] == 4
        assert list(model["tasks"]) == ["two"]
    assert evaluation["settings"]["blocks"] == 4
    assert main(arguments) == 0
    assert list(_json(out)["models"]["student"]["tasks"]) == ["one", "two"]


def test_model_is_measured_by_itself_on_a_text_of_the_users_own(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    text = text_file(tmp_path)
    assert main(["evaluate", str(tiny_folder), "--text", str(text), "--out", "e.json"]) == 0
    evaluation = _json(tmp_path / "e.json")
    assert list(evaluation["models"]) == ["student"]
    assert evaluation["models"]["student"]["layers"] == 6
    # All of the text and its EOS, in blocks of as many tokens as the model has positions.
    assert evaluation["settings"]["blocks"] == (len(text.read_text()) + 1) // 256
    assert evaluation["settings"]["tokens"] == evaluation["settings"]["blocks"] * 255


def test_teacher_compared_with_itself_has_lost_nothing(tiny_folder: Path, tasks: Path, tmp_path: Path):
    out = tmp_path / "e.json"
    same = ["evaluate", str(tiny_folder), "--teacher", str(tiny_folder), "--out", str(out)]
    assert main([*same, "--text", str(text_file(tmp_path)), "--task-folder", str(tasks)]) == 0
    evaluation = _json(out)
    assert evaluation["agreement"] == {"top1": 1.0, "kl": 0.0}
    assert set(evaluation["retained"].values()) == {1.0}
    assert all(sample["student"] == sample["teacher"] for sample in evaluation["samples"])


def test_several_models_have_a_file_each_and_ask_their_teacher_once(
    finished: Path, tiny_folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []
    answered = measuring.Tasks.answered
    monkeypatch.setattr(
        measuring.Tasks,
        "answered",
        lambda self, *given: asked.append(given[0].config.num_hidden_layers) or answered(self, *given),
    )
    other = tmp_path / "other"
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    assert main(["collapse", "--config", str(config), "--target-depth", "5", "--out", str(other)]) == 0
    assert main(["evaluate", str(finished), str(other), "--task-folder", str(tasks)]) == 0
    assert asked == [4, 6, 5]
    assert [_json(place / "evaluation.json")["models"]["student"]["layers"] for place in (finished, other)] == [4, 5]


def test_text_shorter_than_a_block_is_one_block(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("layer merge teacher")
    assert main(["evaluate", str(tiny_folder), "--text", "short.txt", "--out", "e.json"]) == 0
    settings = _json(tmp_path / "e.json")["settings"]
    length = len("layer merge teacher") + 1  # and the EOS
    assert (settings["blocks"], settings["block_size"], settings["tokens"]) == (1, length, length - 1)
    assert [record.getMessage() for record in caplog.records] == [f"short.txt: 1 block of {length} tokens"]


@pytest.mark.parametrize("option", [["--limit", "1"], ["--out", "{}/e.json"]])
def test_figures_for_oneself_leave_the_model_card_alone(option: list[str], finished: Path, tmp_path: Path):
    card = finished / "student" / "README.md"
    before = card.read_text()
    assert main(["evaluate", str(finished), "--dtype", "bfloat16", *(part.format(tmp_path) for part in option)]) == 0
    assert card.read_text() == before


def test_model_card_of_an_export_tells_the_last_evaluation(finished: Path, tasks: Path):
    assert main(["evaluate", str(finished), "--task-folder", str(tasks)]) == 0
    card = (finished / "student" / "README.md").read_text()
    settings = _json(finished / "evaluation.json")["settings"]
    assert f"held-out part of recipe.yaml's data ({settings['blocks']} blocks, {settings['tokens']} tokens), in" in card
    assert card.count("## Evaluation") == 1
    assert "| one acc |" in card
    assert "## Data" in card


# What is typed behind `evaluate RUN`, and what the sentence has to say.
MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "text and config": (["--text", "a.txt", "--config", "b.yaml"], ("--text and --config",)),
    "limit of nothing": (["--limit", "0"], ("--limit 0", "1 or more")),
    "limit that is no number": (["--limit", "x"], ("--limit", "x")),
    "dtype": (["--dtype", "int3"], ("--dtype int3", "float32")),
    "device": (["--device", "tpu"], ("--device tpu", "cpu, cuda")),
    "missing text": (["--text", "nowhere.txt"], ("--text nowhere.txt", "does not exist")),
    "missing config": (["--config", "nowhere.yaml"], ("nowhere.yaml", "does not exist")),
    "missing task folder": (["--task-folder", "nowhere"], ("nowhere", "is not a folder")),
    "task folder without tasks": (["--task-folder", "{empty}"], ("empty", "holds no NAME.jsonl")),
    "folder as out": (["--out", "."], ("is a folder", "name a file")),
    "one out for two models": (["{other}", "--out", "e.json"], ("--out", "2 models")),
    "model that is not there": (["./nowhere"], ("./nowhere", "does not exist")),
    "folder without a model": (["{empty}"], ("holds neither a model", "config.json")),
    "teacher of another depth": (["--teacher", "{other}"], ("3 layers", "descends from a model of 6")),
    "teacher that is not there": (["--teacher", "./nowhere"], ("./nowhere", "does not exist")),
    "unknown option": (["--taks", "x"], ("--taks", "--help")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_sentence_before_weights_are_loaded(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "empty").mkdir()
    save_tiny(tmp_path / "other", tiny_llama(3))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "load", lambda *given, **named: pytest.fail("weights were loaded"))
    given, expected = MISTAKES[name]
    arguments = [argument.format(other=tmp_path / "other", empty=tmp_path / "empty") for argument in given]
    capsys.readouterr()
    assert main(["evaluate", str(finished), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lcprune: ")]
    assert len(lines) == 1
    assert all(part in lines[0] for part in expected), lines[0]
    assert not list(tmp_path.rglob("*.json.tmp*"))


def test_teacher_of_another_vocabulary_is_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = save_tiny(tmp_path / "other")
    config = _json(other / "config.json")
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 98}))
    assert main(["evaluate", str(tiny_folder), "--teacher", str(other), "--out", str(tmp_path / "e.json")]) == 2
    assert "vocabulary of 98" in capsys.readouterr().err


def _flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


# Every command that reads an exported model, with {short} for its folder and {config} for a recipe around {short}.
READERS: dict[str, Callable[[str, str], list[str]]] = {
    "fit": lambda short, config: ["fit", "--config", config],
    "collapse": lambda short, config: ["collapse", "--config", config, "--out", f"{short}er"],
    "collapse streamed": lambda short, config: ["collapse", "--config", config, "--out", f"{short}er", "--stream"],
    "score": lambda short, config: ["score", "--config", config],
    "evaluate": lambda short, config: ["evaluate", short, "--text", f"{short}/../text.txt"],
    "export": lambda short, config: ["export", short, "--gguf", f"{short}.gguf"],
    "fit of a student": lambda short, config: ["fit", "--config", config, "--model.student", short],
}


@pytest.mark.parametrize("command", READERS)
def test_flipped_bit_in_an_export_is_noticed_by_every_command(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    tiny = save_tiny(tmp_path / "tiny")
    text = text_file(tmp_path)
    config = str(write(tmp_path, recipe(tiny, text, tmp_path / "run")))
    short = str(tmp_path / "short")
    assert main(["collapse", "--config", config, "--target-depth", "5", "--out", short]) == 0
    if "student" not in command:
        config = str(write(tmp_path, recipe(tmp_path / "short", text, tmp_path / "run")))
    _flip(tmp_path / "short")
    monkeypatch.setattr("lcprune.delivery.gguf.converter", lambda: Path("converter"))
    capsys.readouterr()
    assert main(READERS[command](short, config)) == 2
    error = capsys.readouterr().err
    assert "model.safetensors is not as it was exported" in error
