"""llama.cpp's converter is found, called as it wants, and leaves a whole file or none; a script stands in for it."""

import json
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


def _layers(folder: Path, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config))


SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = {"num_hidden_layers": 7, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 8, "query_pre_attn_scalar": 8}


@pytest.mark.parametrize(
    ("model_type", "field", "kinds", "layer"),
    [
        ("gemma2", "layer_types", [SLIDING, FULL, SLIDING, FULL], None),
        ("gemma2", "layer_types", [SLIDING, FULL, FULL, SLIDING], 2),
        ("gemma3_text", "layer_types", [*[SLIDING] * 5, FULL, SLIDING], None),
        ("gemma3_text", "layer_types", [*[SLIDING] * 4, FULL, SLIDING, SLIDING], 4),
        ("smollm3", "no_rope_layers", [1, 1, 1, 0, 1], None),
        ("smollm3", "no_rope_layers", [1, 1, 0, 1, 1], 2),
        ("qwen2", "layer_types", [FULL, SLIDING], None),
    ],
)
def test_layers_that_llama_cpp_would_take_for_others_are_refused(
    model_type: str,
    field: str,
    kinds: list[object],
    layer: int | None,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(gguf.PLACE, str(_install(tmp_path / "llama.cpp")))
    _layers(model, model_type=model_type, **{**GEMMA, field: kinds})
    if layer is None:
        gguf.convert(model, tmp_path / "x.gguf")
        return
    with pytest.raises(InputError, match=f"makes no GGUF file: its {field} says {kinds[layer]} of layer {layer}, "):
        gguf.convert(model, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("model_type", "depth", "scalar", "taken"),
    [
        ("gemma2", 46, 16, None),
        ("gemma2", 44, 16, 8),
        ("gemma2", 44, 8, None),
        ("gemma2", 46, 8, 16),
        ("gemma3_text", 56, 16, 8),
    ],
)
def test_scale_that_llama_cpp_would_take_for_another_is_refused(
    model_type: str, depth: int, scalar: int, taken: int | None, model: Path
):
    _layers(model, **{**GEMMA, "model_type": model_type, "num_hidden_layers": depth, "query_pre_attn_scalar": scalar})
    if taken is None:
        gguf.check_layers(model)
        return
    with pytest.raises(InputError, match=rf"query_pre_attn_scalar is {scalar}, .* of {depth} layers to have {taken}: "):
        gguf.check_layers(model)
