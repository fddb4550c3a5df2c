"""Which folder an export may take the place of, and which it must not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from lcprune.delivery.export import check_target, export
from lcprune.errors import InputError
from tests.builders import tiny_llama
from tests.delivery.exports import HISTORY, contents


def test_export_replaces_an_earlier_one_entirely(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    out = tmp_path / "short"
    out.mkdir()
    export(tiny_llama(4, seed=1), out, tokenizer=tokenizer, history=HISTORY, recipe="old: 1\n")
    export(tiny_llama(4, seed=2), out, tokenizer=tokenizer, history=HISTORY)
    assert torch.equal(
        load_file(out / "model.safetensors")["model.embed_tokens.weight"],
        tiny_llama(4, seed=2).state_dict()["model.embed_tokens.weight"],
    )
    assert not (out / "recipe.yaml").exists()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("files", [["notes.txt"], ["history.json", "checkpoints/last.ckpt"], ["config.json"]])
def test_export_refuses_a_folder_that_is_not_an_export(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, files: list[str]
):
    out = tmp_path / "mine"
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=str(out)):
        export(tiny_llama(4), out, tokenizer=tokenizer, history=HISTORY)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "checkpoints/last.ckpt", "checkpoint-500/config.json", "tokenizer.json/mine", "other.safetensors"],
)
def test_export_refuses_an_earlier_one_that_holds_what_no_export_writes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
):
    out = export(tiny_llama(4), tmp_path / "mine", tokenizer=tokenizer, history=HISTORY)
    for written in ("evaluation.json", "report.html", "report-tree.svg", "report-1-stream-student.png"):
        (out / written).touch()
    check_target(out)
    place = out / name
    if place.parent != out:
        place.parent.unlink(missing_ok=True)
        place.parent.mkdir()
    place.write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"holds {name.split('/')[0]}, which no export has written"):
        export(tiny_llama(4), out, tokenizer=tokenizer, history=HISTORY)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("below", ["", "checkpoint-500"])
def test_check_target_refuses_what_the_student_is_made_of(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, below: str
):
    out = export(tiny_llama(4), tmp_path / "mine", tokenizer=tokenizer, history=HISTORY)
    (out / below).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(out / below)
    for given in (out / below, f"mine/{below}", "link"):
        with pytest.raises(InputError, match=f"holds model.student={given}, which stays as it is"):
            check_target(Path("mine"), {"model.teacher": ["owner/mine"], "model.student": [given]})


@pytest.mark.parametrize("name", ["file", "file/below", "file/below/further"])
def test_check_target_refuses_what_cannot_be_a_folder(tmp_path: Path, name: str):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="out="):
        check_target(tmp_path / name)


def test_check_target_makes_nothing(tmp_path: Path):
    check_target(tmp_path / "a" / "b")
    assert not any(tmp_path.iterdir())
