"""`lcprune export`: of a checkpoint, a run, a folder; to the hub and to GGUF; what cannot end well is not begun."""

from pathlib import Path

import pytest

from lcprune.cli import main
from lcprune.delivery import gguf, hub
from tests.cli.recipe import recipe, text_file, write

CONVERTER = "import pathlib, sys; pathlib.Path(sys.argv[3]).write_bytes(b'GGUF of ' + sys.argv[1].encode())\n"


@pytest.fixture(scope="module")
def short(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run-like folder whose student is an export of `lcprune collapse`."""
    folder = tmp_path_factory.mktemp("collapse")
    config = write(folder, recipe(tiny_folder, text_file(folder), folder / "run"))
    assert main(["collapse", "--config", str(config), "--out", str(folder / "run" / "student")]) == 0
    return folder / "run" / "student"


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / gguf.SCRIPT).write_text(CONVERTER)
    monkeypatch.setenv(gguf.PLACE, str(tmp_path / "llama.cpp"))


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("above", [False, True])
def test_export_makes_a_gguf_of_a_folder_and_of_a_run(
    above: bool, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "x.gguf"
    assert main(["export", str(short.parent if above else short), "--gguf", str(out)]) == 0
    assert out.read_bytes() == b"GGUF of " + str(short).encode()
    assert f"gguf: {out}" in capsys.readouterr().out


def test_export_pushes_the_folder(short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    calls: list[object] = []
    monkeypatch.setattr(hub, "check", lambda name: calls.append(name))
    monkeypatch.setattr(hub, "push", lambda folder, name: calls.append((folder, name)) or "https://hub/me/short")
    assert main(["export", str(short), "--push-to-hub", "me/short"]) == 0
    assert calls == ["me/short", (short, "me/short")]
    said = capsys.readouterr()
    assert "hub: https://hub/me/short" in said.out
    assert said.err.count("lcprune: ") == 1
    assert "recipe.yaml, history.json go to the hub as they are and name places on this machine, such as /" in said.err


# Arguments behind `export`, with {short} for an export, and what the sentence has to say.
MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "offline": (["{short}", "--push-to-hub", "me/short"], ("--push-to-hub me/short", "HF_HUB_OFFLINE")),
    "offline for a checkpoint": (["x.ckpt", "--out", "o", "--push-to-hub", "me/s"], ("HF_HUB_OFFLINE",)),
    "no converter": (["{short}", "--gguf", "x.gguf"], ("convert_hf_to_gguf.py", "LLAMA_CPP")),
    "no converter for a checkpoint": (["x.ckpt", "--out", "o", "--gguf", "x.gguf"], ("LLAMA_CPP",)),
    "folder to a folder": (["{short}", "--out", "o"], ("is a folder already", "--out")),
    "folder to nothing": (["{short}"], ("is a folder already", "--push-to-hub NAME or --gguf FILE")),
    "teacher of a folder": (["{short}", "--push-to-hub", "a/b", "--teacher", "m"], ("--teacher m", "drop it")),
    "type without a file": (["{short}", "--push-to-hub", "a/b", "--gguf-type", "q8_0"], ("--gguf-type q8_0",)),
    "nothing at all": (["nowhere", "--gguf", "x.gguf"], ("--out is missing", "nowhere is no folder")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_export_that_could_not_end_well_is_not_begun(
    name: str, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(gguf.PLACE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("lcprune.cli.delivery.load_student", lambda path: pytest.fail("the checkpoint was read"))
    given, expected = MISTAKES[name]
    assert main(["export", *(argument.format(short=short) for argument in given)]) == 2
    error = capsys.readouterr().err
    assert error.count("lcprune: ") == 1
    assert all(part in error for part in expected), error
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("llama_cpp")
def test_export_of_a_folder_that_holds_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    assert main(["export", str(tmp_path / "empty"), "--gguf", str(tmp_path / "x.gguf")]) == 2
    assert "holds neither a model" in capsys.readouterr().err
