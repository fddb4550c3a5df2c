"""An exported folder is whole, proved, and needs nothing of ours; or it is not there at all."""

import errno
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lcprune.delivery import export as delivery
from lcprune.delivery.export import export, export_stream
from lcprune.errors import DiskError, RunError
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.streaming import stored_tensors
from lcprune.weights import size_of
from tests.builders import FAMILIES, Family, tiny_llama, token_batches
from tests.delivery.exports import HISTORY, contents

# Plain transformers: importing lcprune fails here, however it is installed.
RELOAD = """
import json, sys
sys.modules["lcprune"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("one two", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.save(model(ids).logits, folder + ".logits")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert cached.shape[1] == ids.shape[1] + 8 and torch.equal(cached, plain)
"""


def _failing(error: BaseException) -> Callable[..., None]:
    def save_pretrained(*args: object, **options: object) -> None:
        raise error

    return save_pretrained


def _afterwards(tokenizer: PreTrainedTokenizerFast, damage: Callable[[Path], None]) -> Callable[..., object]:
    """A save_pretrained for the tokenizer that damages the model saved before it."""
    save = tokenizer.save_pretrained

    def save_pretrained(folder: Path) -> object:
        damage(folder)
        return save(folder)

    return save_pretrained


def test_export_loads_without_lcprune_with_equal_logits_and_a_working_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    students = {name: tiny_llama(4, tied=name == "tied") for name in ("tied", "untied")}
    folders = [export(model, tmp_path / name, tokenizer=tokenizer, history=HISTORY) for name, model in students.items()]
    command = [sys.executable, "-c", RELOAD, *map(str, folders)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ids = tokenizer("one two", return_tensors="pt").input_ids
    for name, student in students.items():
        with torch.no_grad():
            torch.testing.assert_close(torch.load(tmp_path / f"{name}.logits"), student(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_is_proved_for_every_family(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_type: Family, dtype: torch.dtype
):
    student = tiny_llama(4, model_type=model_type, dtype=dtype)
    out = export(student, tmp_path / "short", tokenizer=tokenizer, history=HISTORY)
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"]) == (4, str(dtype).removeprefix("torch."))
    assert size_of(out) >= student.num_parameters() * dtype.itemsize


def test_compiled_student_whose_graphs_round_otherwise_is_exported(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    def rounding(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        return lambda *args: tuple(out * 1.001 if out.is_floating_point() else out for out in graph(*args))

    student = tiny_llama(4)
    for layer in student.model.layers:
        layer.forward = torch.compile(layer.forward, backend=rounding)
    export(student, tmp_path / "out", tokenizer=tokenizer, history=HISTORY)
    assert size_of(tmp_path / "out") > 0


def test_student_that_is_training_with_dropout_is_exported(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    student = tiny_llama(4).train()
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    export(student, tmp_path / "out", tokenizer=tokenizer, history=HISTORY)
    assert size_of(tmp_path / "out") > 0


def test_tokenizer_may_be_named_by_a_folder(tiny_folder: Path, tmp_path: Path):
    out = export(tiny_llama(4), tmp_path / "short", tokenizer=tiny_folder, history=HISTORY)
    ours, theirs = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (out, tiny_folder))
    assert ours == theirs


def test_export_keeps_history_and_recipe(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    recipe = "seed_everything: 1  # é\n"
    out = export(tiny_llama(4), tmp_path / "a" / "b", tokenizer=tokenizer, history=HISTORY, recipe=recipe)
    assert MergeHistory.load(out / "history.json") == HISTORY
    assert (out / "recipe.yaml").read_text(encoding="utf-8") == recipe
    assert {"model.safetensors", "generation_config.json", "tokenizer.json"} <= set(contents(out))


def test_export_leaves_the_student_as_it_was(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    student = tiny_llama(4).train()
    student.model.layers[1].eval()
    student.model.norm.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    modes = [module.training for module in student.modules()]
    random_state = torch.get_rng_state()
    export(student, tmp_path / "short", tokenizer=tokenizer, history=HISTORY)
    assert modes == [module.training for module in student.modules()]
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert student(token_batches()[0]).logits.requires_grad


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskError),
        (PermissionError(errno.EACCES, "Permission denied"), DiskError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_export_that_fails_leaves_everything_as_it_was(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    earlier: bool,
    error: BaseException,
    raised: type[BaseException],
):
    out = tmp_path / "short"
    if earlier:
        export(tiny_llama(4, seed=1), out, tokenizer=tokenizer, history=HISTORY)
    before = contents(tmp_path)
    monkeypatch.setattr(tokenizer, "save_pretrained", _failing(error))
    with pytest.raises(raised) as caught:
        export(tiny_llama(4), out, tokenizer=tokenizer, history=HISTORY)
    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([out] if earlier else [])
    if raised is not KeyboardInterrupt:
        assert str(out) in str(caught.value)
        assert "nothing was left behind" in str(caught.value)


@pytest.mark.parametrize("name", ["save_pretrained of the student", "save_pretrained of the tokenizer", "the rest"])
@pytest.mark.parametrize("limit", [0, 1000])
def test_export_that_the_disk_refuses_leaves_everything_as_it_was(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
):
    """The kernel refuses to let a file grow, as it does where a disk is full: by the writers' own errors."""
    student, limits = tiny_llama(4), resource.getrlimit(resource.RLIMIT_FSIZE)

    def small(write: Callable[..., object]) -> Callable[..., object]:
        def refused(*arguments: object, **named: object) -> object:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            try:
                return write(*arguments, **named)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        return refused

    owners = {"save_pretrained of the student": student, "save_pretrained of the tokenizer": tokenizer}
    owner, attribute = (owners[name], "save_pretrained") if name in owners else (delivery, "_write_account")
    monkeypatch.setattr(owner, attribute, small(getattr(owner, attribute)))
    with pytest.raises(DiskError, match=r"File too large.*nothing was left behind"):
        export(student, tmp_path / "short", tokenizer=tokenizer, history=HISTORY)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("mark", ["tmp", "old"])
def test_export_takes_away_what_a_killed_one_left(mark: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name, age in (("short", 100), ("short", 0), ("other", 100)):
        left = tmp_path / f".{name}.{mark}-{gone.pid if age else os.getppid()}"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
        os.utime(left, (time.time() - age,) * 2)
    export(tiny_llama(4), tmp_path / "short", tokenizer=tokenizer, history=HISTORY)
    kept = {"short", f".short.{mark}-{os.getppid()}", f".other.{mark}-{gone.pid}"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_export_that_fails_leaves_what_a_killed_one_replaced(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    replaced = tmp_path / f".short.old-{gone.pid}"
    replaced.mkdir()
    os.utime(replaced, (0, 0))
    with pytest.raises(RunError):
        export(_diverged(tiny_llama(4)), tmp_path / "short", tokenizer=tokenizer, history=HISTORY)
    assert replaced.is_dir()


def test_export_puts_the_earlier_one_back_when_the_rename_fails(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    out = export(tiny_llama(4, seed=1), tmp_path / "short", tokenizer=tokenizer, history=HISTORY)
    before = contents(tmp_path)
    rename = Path.rename

    def fails_for_the_new_one(path: Path, target: Path) -> Path:
        if ".tmp-" in path.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="Input/output error"):
        export(tiny_llama(4), out, tokenizer=tokenizer, history=HISTORY)
    assert contents(tmp_path) == before


def _turn_faster(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 10.0'))


def _turn_by_no_number(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": NaN'))


def _nudge_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] *= 1 + 2**-20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_turn_faster, "other logits"),
        (_turn_by_no_number, "other logits .*largest difference nan"),
        (_nudge_a_weight, r"in 1 of .*model\.norm\.weight"),
    ],
)
def test_export_finds_a_folder_that_does_not_give_the_student_back(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    message: str,
):
    monkeypatch.setattr(tokenizer, "save_pretrained", _afterwards(tokenizer, damage))
    with pytest.raises(RuntimeError, match=message):
        export(tiny_llama(4), tmp_path / "short", tokenizer=tokenizer, history=HISTORY)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("holder", ["student", "reloaded"])
def test_tensor_that_only_one_of_student_and_reloaded_has_is_a_difference(holder: str):
    models = {"student": tiny_llama(4), "reloaded": tiny_llama(4)}
    models[holder].model.norm.register_parameter("bias", nn.Parameter(torch.zeros(2)))
    with pytest.raises(RunError, match=r"in 1 of .*first model\.norm\.bias"):
        delivery._check_weights(**models)


def _streamed(student: PreTrainedModel, out: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tensors = ((name, [tensor]) for name, tensor in stored_tensors(student).items())
    return export_stream(student, tensors, out, tokenizer=tokenizer, history=HISTORY)


def test_streamed_export_keeps_the_generation_config(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    student = tiny_llama(4)
    student.generation_config.max_new_tokens = 77
    out = _streamed(student, tmp_path / "short", tokenizer)
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 77


def test_streamed_export_finds_a_folder_that_is_not_what_was_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokenizer, "save_pretrained", _afterwards(tokenizer, _nudge_a_weight))
    with pytest.raises(RunError, match=r"read back, differs in 1 of .*first model\.norm\.weight"):
        _streamed(tiny_llama(4), tmp_path / "short", tokenizer)
    assert not any(tmp_path.iterdir())


def _diverged(student: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        student.model.norm.weight[0] = torch.inf
    return student


@pytest.mark.parametrize(
    ("student", "message"),
    [(lambda: tiny_llama(5), "num_hidden_layers=5.* 4"), (lambda: _diverged(tiny_llama(4)), "not finite")],
)
def test_export_refuses_a_student_that_is_not_what_it_claims(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, student: Callable[[], PreTrainedModel], message: str
):
    with pytest.raises(RuntimeError, match=message):
        export(student(), tmp_path / "short", tokenizer=tokenizer, history=HISTORY)
    assert not any(tmp_path.iterdir())
