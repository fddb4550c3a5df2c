"""llama.cpp's converter is found, called as it wants, and leaves a whole file or none; a script stands in for it."""

import os
from pathlib import Path

import pytest

from lcprune.delivery import gguf
from lcprune.errors import InputError, RunError

CONVERTER = """\
import pathlib, sys
model, _, outfile, _, outtype = sys.argv[1:]
assert sys.argv[2::2] == ["--outfile", "--outtype"]
names = ",".join(sorted(path.name for path in pathlib.Path(model).iterdir()))
pathlib.Path(outfile).write_bytes(b"{magic}" + f" {{outtype}} {{names}}".encode())
{end}
"""


def _install(folder: Path, magic: str = "GGUF", end: str = "") -> Path:
    folder.mkdir()
    script = folder / gguf.SCRIPT
    script.write_text(CONVERTER.format(magic=magic, end=end))
    script.chmod(0o755)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.json").write_text("{}")
    return tmp_path / "short"


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gguf.PLACE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")


def test_converter_that_is_nowhere_is_named_with_the_way_to_it(tmp_path: Path):
    with pytest.raises(InputError, match=r"git clone .*llama\.cpp.*LLAMA_CPP"):
        gguf.check(tmp_path / "x.gguf", "auto")


@pytest.mark.parametrize("below", ["", gguf.SCRIPT])
def test_converter_is_found_in_a_checkout_before_path(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(_install(tmp_path / "bin")))
    assert gguf.converter() == tmp_path / "bin" / gguf.SCRIPT
    monkeypatch.setenv(gguf.PLACE, str(_install(tmp_path / "llama.cpp") / below))
    assert gguf.converter() == tmp_path / "llama.cpp" / gguf.SCRIPT


def test_checkout_without_the_converter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(gguf.PLACE, str(tmp_path))
    with pytest.raises(InputError, match=r"LLAMA_CPP=.* holds no convert_hf_to_gguf\.py"):
        gguf.converter()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [("x.bin", "auto", "ends in .gguf"), ("x.gguf", "q3", "--gguf-type q3 must be one of auto")],
)
def test_target_that_makes_no_sense_is_refused(name: str, kind: str, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        gguf.check(tmp_path / name, kind)


def test_file_is_what_the_converter_made_of_the_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(gguf.PLACE, str(_install(tmp_path / "llama.cpp")))
    out = tmp_path / "phone" / "short.gguf"
    gguf.convert(model, out, "q8_0")
    assert out.read_bytes() == b"GGUF q8_0 config.json"
    assert os.listdir(out.parent) == ["short.gguf"]  # noqa: PTH208


@pytest.mark.parametrize(
    ("magic", "end", "reason"),
    [("GGUF", "raise NotImplementedError('no such family')", "no such family"), ("oops", "print('done')", "done")],
)
def test_converter_that_fails_leaves_everything_as_it_was(
    magic: str, end: str, reason: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(gguf.PLACE, str(_install(tmp_path / "llama.cpp", magic, end)))
    out = tmp_path / "short.gguf"
    out.write_bytes(b"GGUF before")
    with pytest.raises(RunError, match=reason):
        gguf.convert(model, out)
    assert out.read_bytes() == b"GGUF before"
    assert {path.name for path in tmp_path.iterdir()} == {"short", "llama.cpp", "short.gguf"}
