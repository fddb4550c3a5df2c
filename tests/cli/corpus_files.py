"""Files that are not what they should be, and what lcprune says to them: models, checkpoints, plans.

A part of the corpus that test_bad_input.py runs, see corpus.py.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.cli.corpus import Parts


def _config(**settings: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | settings))

    return spoil


def _file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


# What is done to a good model's folder.
MODELS: dict[str, tuple[Callable[[Path], object], Parts]] = {
    "pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        ("model.teacher", "only pickled weights (pytorch_model.bin)", "save_pretrained"),
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("model.teacher", "neither", "choose one")),
    "weights cut off": (_file("model.safetensors", b"\x08"), ("no whole safetensors file", "fetch or save it again")),
    "an adapter": (_file("adapter_config.json", b"{}"), ("adapter_config.json", "merge_and_unload")),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("holds no config.json", "save_pretrained")),
    "config that is no JSON": (_file("config.json", b"{"), ("no configuration that could be read", "fetch the model")),
    "config without a kind": (_file("config.json", b"{}"), ("no configuration", "model_type", "fetch the model")),
    "word for a depth": (_config(num_hidden_layers="six"), ("'num_hidden_layers' expected int", "fetch the model")),
    "negative depth": (_config(num_hidden_layers=-3), ("teacher_depth=-3", "between 1 and")),
    "depth of no model": (_config(num_hidden_layers=10**9), ("teacher_depth=1000000000", "between 1 and")),
    "no heads": (_config(num_attention_heads=0), ("no configuration that could be read", "fetch the model")),
    "unknown activation": (_config(hidden_act="nonsense"), ("cannot build", "'nonsense'", "correct the config")),
    "negative vocabulary": (_config(vocab_size=-1), ("cannot build", "correct the config")),
    "dtype of whole numbers": (_config(dtype="int8"), ("dtype=torch.int8", "correct it")),
    "quantised model": (_config(quantization_config={"quant_method": "gptq"}), ("is quantised", "before that")),
    "weights named elsewhere": (
        _config(transformers_weights="../x.safetensors"),
        ("transformers_weights='../x.safetensors'", "correct it"),
    ),
    "code of its own": (
        _config(model_type="mine", auto_map={"AutoConfig": "code.Config"}),
        ("in code of its own", "never runs", "choose a model"),
    ),
    "encoder": (_config(model_type="bert"), ("model_type='bert'", "it knows llama", "LayerLayout")),
    "tokenizer that is no JSON": (
        _file("tokenizer.json", b"{"),
        ("no tokenizer that could be read", "fetch the model"),
    ),
    "tokenizer of nothing": (_file("tokenizer.json", b'{"a": 1}'), ("no tokenizer that could", "fetch the model")),
}


def _of_another_model(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lcprune"]["fingerprint"]["hidden_size"] = 4096
    torch.save(checkpoint, path)


# What is done to a good checkpoint.
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], Parts]] = {
    "another model's": (_of_another_model, ("another model", "hidden_size 4096", "name the model")),
    "another program's": (lambda path: torch.save({"state_dict": {}}, path), ("did not write", "a run's folder")),
    "a list": (lambda path: torch.save([1, 2], path), ("not a Lightning checkpoint", "a run's folder")),
    "cut off": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        ("not a whole checkpoint", "name another one"),
    ),
    "empty": (lambda path: path.write_bytes(b""), ("not a whole checkpoint", "name another one")),
    "safetensors": (
        lambda path: save_file({"x": torch.ones(2)}, path),
        ("not a whole checkpoint", "name another one"),
    ),
    "missing": (lambda path: path.unlink(), ("does not exist", "RUN/checkpoints/")),
}

_DROP: Mapping[str, object] = {"class_path": "Drop"}


def _plan(*steps: object, **more: object) -> str:
    return json.dumps({"format": 1, "teacher_depth": 6, "steps": steps, **more})


# The text of the file that `collapse --plan` reads.
PLANS: dict[str, tuple[str, Parts]] = {
    "no JSON": ("{", ("not JSON",)),
    "deep nesting": ("[" * 10**5, ("not JSON",)),
    "number of thousands of digits": ('{"format": ' + "1" * 5000 + "}", ("not JSON",)),
    "a list": ("[]", ("JSON object, not list",)),
    "newer format": (_plan(format=2), ("format=2", "not 1")),
    "unknown key": (_plan(stesp=[]), ("'stesp'", "known are")),
    "gap in a group": (_plan({"group": [1, 3], "operator": _DROP}), ("group=[1, 3]", "[12, 13, 14]")),
    "layer that is not there": (_plan({"group": [5, 6], "operator": _DROP}), ("group=[5, 6]", "last layer 5")),
    "shares that are too much": (
        _plan({"group": [1, 2], "operator": _DROP, "shares": [10**400, 0]}),
        ("shares=", "sum to 1"),
    ),
    "unknown operator": (_plan({"group": [1, 2], "operator": {"class_path": "Dorp"}}), ("'Dorp'", "known are", "Drop")),
    "operator that is a function": (
        _plan({"group": [1, 2], "operator": {"class_path": "os.system", "init_args": {"command": "ls"}}}),
        ("'os.system' is not an operator", "known are"),
    ),
    "argument beside the arguments": (
        _plan({"group": [1, 2], "operator": {"class_path": "Drop", "keep": "last"}}),
        ("'keep' beside it", "under init_args"),
    ),
    "unknown refit": (
        _plan({"group": [1, 2], "operator": _DROP, "refit": {"class_path": "Rigde"}}),
        ("'Rigde' is not a refit", "RidgeRefit"),
    ),
    "refit of words": (
        _plan(
            {
                "group": [1, 2],
                "operator": _DROP,
                "refit": {"class_path": "RidgeRefit", "init_args": {"strengths": ["strong"]}},
            }
        ),
        ("strengths=['strong']", "numbers above 0"),
    ),
    "another model's depth": (_plan(teacher_depth=7), ("teacher_depth=7", "6")),
    "no merges": (_plan(), ("plan.json merges nothing", "give it steps")),
    "another model": (_plan(teacher="somebody/else"), ("somebody/else", "name that one")),
    "changed by hand": (_plan(sha256="0" * 64), ("sha256 differs", "delete the entry")),
}
