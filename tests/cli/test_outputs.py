"""Where a command is to write is looked at before anything is loaded, by one rule for all of them."""

import os
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from lcprune.cli import main
from tests.cli.recipe import recipe, text_file, write
from tests.delivery import run_folders

# Every command that writes a file, with {out} for it; {config}, {run} and {model} are what it may read.
WRITERS = {
    "score": "score --config {config} --out {out}.json",
    "score with a picture": "score --config {config} --out {out}",
    "plan of collapse": "collapse --config {config} --plan-only --out {out}.json",
    "collapse": "collapse --config {config} --out {out}",
    "collapse-checkpoint": "collapse-checkpoint nowhere.ckpt {out}.ckpt --config {config}",
    "cache": "cache --config {config} --out {out}",
    "evaluate": "evaluate {model} --out {out}.json",
    "report": "report {run} --out {out}.html",
    "export": "export nowhere.ckpt --out {out}",
    "gguf": "export {model} --gguf {out}.gguf",
    "recipes": "recipes copy come {out}.yaml",
}
FILES = [name for name, line in WRITERS.items() if "{out}." in line and name != "score"]  # score takes either


@pytest.fixture
def typed(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    def loaded(*given: object, **named: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    return {"config": config, "model": tiny_folder, "run": run_folders.write(tmp_path / "read")}


def _refused(line: str, typed: dict[str, Path], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(line.format(**typed, out=out).split()) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lcprune: ")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize("name", WRITERS)
def test_place_where_nothing_may_be_written_is_refused_early(
    name: str,
    typed: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    place = tmp_path / "theirs"
    place.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and access(path, mode))
    said = _refused(WRITERS[name], typed, place / "out", capsys)
    assert f"cannot be made, {place} is not a folder that you may write to: name another place." in said


@pytest.mark.parametrize("name", WRITERS)
def test_place_below_a_file_is_refused_early(
    name: str, typed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is not a folder" in _refused(WRITERS[name], typed, tmp_path / "file" / "out", capsys)


@pytest.mark.parametrize("name", FILES)
def test_folder_in_the_place_of_a_file_is_refused_early(
    name: str, typed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for suffix in ("json", "ckpt", "html", "gguf", "yaml"):
        (tmp_path / f"out.{suffix}").mkdir()
    said = _refused(WRITERS[name], typed, tmp_path / "out", capsys)
    assert "is a folder: name a file" in said or "exists" in said
    assert not any(file for file in tmp_path.glob("out.*/*"))


def test_device_in_the_place_of_a_file_is_left_alone(typed: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    line = "collapse --config {config} --plan-only --out {out}"
    assert "/dev/null is no plain file" in _refused(line, typed, Path("/dev/null"), capsys)
    assert Path("/dev/null").is_char_device()
