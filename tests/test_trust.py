"""What README's paragraph on security promises, one property each: of code, files and the network."""

import ast
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcprune import models, weights
from lcprune.cli import main
from lcprune.distillation.teacher import load
from lcprune.errors import InputError
from lcprune.models import load_tokenizer, read_config
from tests.builders import tiny_llama
from tests.cli.recipe import recipe, text_file, write

SOURCES = sorted((Path(__file__).resolve().parents[1] / "lcprune").rglob("*.py"))
NO_CODE = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}
"""What would run the code that a model brings, if it were asked to."""


def calls(path: Path) -> list[tuple[str, dict[str, ast.expr]]]:
    """Every call in a file: its dotted name and its keyword arguments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), {word.arg: word.value for word in call.keywords if word.arg}) for call in found]


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def is_false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_code_of_a_model_is_never_run(path: Path):
    makers = [f"{maker}.{way}" for maker in NO_CODE for way in ("from_pretrained", "from_config")]
    assert [name for name, given in calls(path) if name in makers and "gguf_file" not in given] == [
        name for name, given in calls(path) if name in makers and is_false(given.get("trust_remote_code"))
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_weights_are_read_from_safetensors_alone(path: Path):
    for name, given in calls(path):
        if name == "AutoModelForCausalLM.from_pretrained" and "gguf_file" not in given:
            assert is_true(given.get("use_safetensors"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_checkpoints_are_read_as_plain_data(path: Path):
    assert all(is_true(given.get("weights_only")) for name, given in calls(path) if name == "torch.load")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_unpickled_evaluated_or_handed_to_a_shell(path: Path):
    names = {name for name, _ in calls(path)}
    assert not names & {"eval", "exec", "compile", "os.system", "pickle.load", "pickle.loads", "yaml.load"}
    allowed = {"subprocess.run"} if path.stem == "gguf" else set()  # llama.cpp's converter, which the user has named
    others = ("subprocess.", "marshal.", "shelve.", "os.exec", "os.spawn")
    assert not any(name.startswith(others) for name in names - allowed)
    assert not any(is_true(given.get("shell")) for _, given in calls(path))


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model's folder, to be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def indexed(names: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / weights.ONE_FILE).rename(folder.parent / "outside.safetensors")
        (folder / weights.INDEX).write_text(json.dumps({"weight_map": names}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / weights.ONE_FILE).rename(folder / "pytorch_model.bin"), "save it with save_pretrain"),
        (lambda folder: (folder / weights.ONE_FILE).unlink(), "neither model.safetensors nor"),
        (lambda folder: (folder / weights.ONE_FILE).write_bytes(b"x" * 99), "no whole safetensors file"),
        (
            lambda folder: (folder / models.ADAPTER).write_text('{"base_model_name_or_path": "/etc"}'),
            "is an adapter",
        ),
        (indexed({"x": "../outside.safetensors"}), r"names '\.\./outside\.safetensors', no safetensors file beside it"),
        (indexed({"x": "/outside.safetensors"}), "names '/outside.safetensors', no safetensors file beside it"),
        (indexed({"x": "..\\outside.bin"}), "no safetensors file beside it"),
        (indexed({"x": "other.safetensors"}), "first other.safetensors"),
        (indexed({"x": 3}), "not an index"),
        (indexed({}), "not an index"),
        (indexed(None), "not an index"),
    ],
)
def test_weights_that_are_no_safetensors_files_of_the_folder_are_refused(
    copied: Path, spoil: Callable[[Path], object], said: str
):
    spoil(copied)
    for read in (weights.check, lambda name: load(name, "float32")):
        with pytest.raises(InputError, match=f"model.teacher.*{said}"):
            read(str(copied))


def configured(folder: Path, file: str, **settings: object) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | settings))


@pytest.mark.parametrize(
    ("file", "settings", "read"),
    [
        ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}, read_config),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "M", "auto_map": {"AutoTokenizer": ["code.M", None]}},
            load_tokenizer,
        ),
    ],
)
def test_model_with_code_of_its_own_is_refused_and_its_code_not_run(
    copied: Path, file: str, settings: dict[str, object], read: Callable[[str], object]
):
    configured(copied, file, **settings)
    (copied / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match="in code of its own, which lcprune never runs"):
        read(str(copied))


def test_model_that_transformers_knows_is_read_without_the_code_beside_it(copied: Path):
    configured(copied, "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (copied / "code.py").write_text("raise SystemExit('ran')")
    assert load(str(copied), "float32").num_parameters() == tiny_llama().num_parameters()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"), "lack 1 of the tensors"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}),
            "another shape, first model.norm.weight",
        ),
        (lambda tensors: tensors["model.norm.weight"].fill_(torch.nan), "not finite, first in model.norm.weight"),
    ],
)
def test_weights_that_transformers_would_make_up_are_refused(
    copied: Path, spoil: Callable[[dict[str, torch.Tensor]], object], said: str
):
    tensors = load_file(copied / weights.ONE_FILE)
    spoil(tensors)
    save_file(tensors, copied / weights.ONE_FILE, metadata={"format": "pt"})
    with pytest.raises(InputError, match=said):
        load(str(copied), "float32")


def test_numbers_of_eight_bits_are_looked_at_too():
    model = tiny_llama()
    found: dict[str, list[object]] = {"missing_keys": [], "mismatched_keys": []}
    weight = model.model.layers[3].mlp.up_proj.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.float8_e4m3fn)
    weights.check_loaded(model, found, "data.generate.model='x'")
    weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"data.generate.model='x' hold .* not finite, first in model.layers.3.mlp"):
        weights.check_loaded(model, found, "data.generate.model='x'")


def test_whole_way_touches_no_network_where_the_hub_is_offline(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = str(write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", trainer__max_steps=4)))
    assert main(["collapse", "--config", config, "--out", str(tmp_path / "short")]) == 0
    assert main(["fit", "--config", config]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "exported")]) == 0
