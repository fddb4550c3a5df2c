"""`lcprune score`: table, JSON and picture; what it says while it works; where it runs."""

import json
from pathlib import Path

import pytest
import torch

from lcprune.cli import bars, main, tables
from lcprune.delivery import pictures
from lcprune.merging.progress import track
from tests.builders import save_tiny, tiny_llama
from tests.cli.recipe import recipe, text_file, write

pytestmark = pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")

CRITERIA = {
    "BlockInfluence",
    "AngularDistance",
    "AngularDistance(span=2)",
    "OutputSimilarity",
    "TrialPerplexity",
    "Magnitude",
    "Taylor",
}


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> str:
    return str(write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run")))


def test_score_into_a_folder_writes_scores_and_picture_and_nothing_else(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "scores"
    assert main(["score", "--config", config, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"scores.json", "scores.png"}
    content = json.loads((out / "scores.json").read_text())
    assert set(content["criteria"]) == CRITERIA
    assert {name: len(values) for name, values in content["criteria"].items() if len(values) != 6} == {
        "AngularDistance(span=2)": 5
    }
    assert (content["layers"], content["dtype"], content["tokens"]) == (6, "float32", 4 * 32)
    assert (len(content["cosines"]), len(content["weights"]["raw"])) == (7, 5)
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run").exists()


def test_score_into_a_json_file_draws_nothing(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "new" / "scores.json"
    assert main(["score", "--config", config, "--out", str(path)]) == 0
    assert set(json.loads(path.read_text())["criteria"]) == CRITERIA
    assert [found.name for found in path.parent.iterdir()] == ["scores.json"]
    shown = capsys.readouterr()
    assert all(name.partition("(")[0] in shown.out for name in CRITERIA)
    # no terminal: a line per stage with its seconds, and no control characters
    stages = [line for line in shown.err.splitlines() if line.endswith(" s")]
    assert any(line.startswith("trying the model without each layer: 6 in ") for line in stages)
    assert "\x1b" not in shown.err


def test_score_without_matplotlib_says_how_to_get_it_and_writes_the_scores(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pictures, "missing", lambda: "matplotlib, pip install 'lcprune[report]'.")
    assert main(["score", "--config", config, "--out", str(tmp_path / "scores")]) == 0
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["scores.json"]
    assert "pip install 'lcprune[report]'" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["picture.png", "text.txt"])
def test_out_that_is_neither_folder_nor_json_is_refused(
    name: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["score", "--config", config, "--out", str(tmp_path / name)]) == 2
    assert "must be a folder" in capsys.readouterr().err
    assert not (tmp_path / "picture.png").exists()


def test_model_of_one_layer_has_nothing_to_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = save_tiny(tmp_path / "model", tiny_llama(1))
    content = recipe(model, text_file(tmp_path), tmp_path / "run")
    assert main(["score", "--config", str(write(tmp_path, content))]) == 2
    assert "1 layer" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["score", "collapse"])
@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--dtype", "int8", ("--dtype int8", "float32, bfloat16, float16")),
        ("--device", "gpu", ("--device gpu", "cpu, cuda")),
        ("--device", "cpu:x", ("--device cpu:x", "cpu, cuda")),
        ("--device", "cuda:99", ("--device cuda:99", "torch finds cpu")),
    ],
)
def test_device_or_dtype_that_cannot_be_had_is_one_sentence_before_weights_are_loaded(
    command: str,
    option: str,
    value: str,
    expected: tuple[str, ...],
    config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("lcprune.cli.options.load", lambda *args: pytest.fail("weights were loaded"))
    assert main([command, "--config", config, "--out", str(tmp_path / "out"), option, value]) == 2
    sentence = capsys.readouterr().err
    assert all(part in sentence for part in expected), sentence
    assert not (tmp_path / "out").exists()


def test_score_in_bfloat16_on_the_cpu(config: str, tmp_path: Path):
    path = tmp_path / "scores.json"
    assert main(["score", "--config", config, "--out", str(path), "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert json.loads(path.read_text())["dtype"] == "bfloat16"


@pytest.mark.gpu
def test_score_on_a_gpu_is_that_on_the_cpu(config: str, tmp_path: Path):
    found = {}
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.json"
        assert main(["score", "--config", config, "--out", str(path), "--device", device]) == 0
        found[device] = json.loads(path.read_text())["criteria"]
    for name, values in found["cpu"].items():
        torch.testing.assert_close(torch.tensor(found["cuda"][name]), torch.tensor(values), rtol=1e-2, atol=1e-3)


def test_table_of_scores_survives_what_is_no_number(capsys: pytest.CaptureFixture[str]):
    tables.scores({"TrialPerplexity": [float("inf"), 2.0, float("nan"), 1.0], "Taylor": [1.0, 1.0, 1.0]})
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == 4
    assert "inf █████ 3" in rows[0]
    assert rows[2].split("│")[2].split() == ["nan"]


def test_nested_stages_without_a_terminal_are_one_line(capsys: pytest.CaptureFixture[str]):
    with bars.shown():
        for _ in track(range(3), "outer"):
            for _ in track(range(2), "inner"):
                for _ in track(range(2), "innermost"):
                    pass
        for _ in track(range(2), "after"):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" in ")[0] for line in lines] == ["outer: 3", "after: 2"]


def test_stages_on_a_terminal_are_two_bars_at_most_and_leave_nothing(monkeypatch: pytest.MonkeyPatch):
    from rich.console import Console
    from rich.progress import Progress

    most = 0
    with Progress(console=Console(force_terminal=True, quiet=True)) as progress:
        stages = bars._Stages(progress)

        def count(what: str, done: int, total: int | None) -> None:
            nonlocal most
            stages(what, done, total)
            most = max(most, len(progress.tasks))

        for outer in range(3):
            count("outer", outer, 2)
            for inner in range(3):
                count("inner", inner, 2)
                for deep in range(3):
                    count("innermost", deep, 2)
            if outer == 2:
                break
        assert most == 2
        stages("outer", 2, 2)
        assert not progress.tasks
