"""Tokens of a large text are made once; what is damaged or of something else is not used."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from lcprune.data import store
from lcprune.data.columns import Documents
from lcprune.data.tokens import Tokens
from tests import builders
from tests.data import chats

DOCUMENTS = Documents("text", texts=["some text", "more"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LCPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "LEAST", 1)
    return tmp_path / "tokens"


class Maker:
    """Makes tokens and counts how often."""

    def __init__(self, value: int = 7) -> None:
        self.times, self.value = 0, value

    def __call__(self) -> Tokens:
        self.times += 1
        return Tokens(torch.tensor([self.value, 8]).int(), torch.tensor([False, True]), torch.tensor([2]))


def kept(
    make: Maker, documents: Documents = DOCUMENTS, tokenizer: PreTrainedTokenizerFast | None = None, **how: object
) -> Tokens:
    usual: dict[str, object] = {"template": None, "learn": "answers"}
    tokenizer = builders.tiny_tokenizer() if tokenizer is None else tokenizer
    return store.kept(documents, tokenizer, make=make, **usual | how)  # type: ignore[arg-type]


def with_other_padding() -> PreTrainedTokenizerFast:
    """Which a template may write."""
    tokenizer = builders.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_tokens_are_made_once_and_read_as_they_were():
    make = Maker()
    one, other = kept(make), kept(make)
    assert make.times == 1
    for name in ("stream", "learned", "lengths"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.equal(right)
        assert left.dtype == right.dtype


@pytest.mark.parametrize(
    "change",
    [
        {"documents": Documents("text", texts=["some text", "mor"])},
        {"documents": Documents("text", texts=["some", " textmore"])},
        {"documents": Documents("chat", conversations=[chats.CHAT])},
        {"tokenizer": chats.characters()},
        {"tokenizer": with_other_padding()},
        {"learn": "all"},
        {"template": chats.template("chatml")},
    ],
    ids=str,
)
def test_other_text_tokenizer_or_settings_give_other_tokens(change: dict[str, object]):
    kept(Maker())
    make = Maker()
    kept(make, **change)  # type: ignore[arg-type]
    assert make.times == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_damaged_file_is_made_anew(folder: Path, damage: str):
    kept(Maker())
    (path,) = folder.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "other":
        path.write_bytes(b"x" * 100)
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    make = Maker()
    assert kept(make).stream.tolist() == [7, 8]
    assert make.times == 1
    kept(make)
    assert make.times == 1
    assert [file.name for file in folder.iterdir()] == [path.name]


def test_file_without_a_checksum_is_made_anew(folder: Path):
    kept(Maker())
    (path,) = folder.iterdir()
    save_file(load_file(path), path)
    make = Maker()
    kept(make)
    assert make.times == 1


def test_folder_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LCPRUNE_CACHE", str(tmp_path / "file"))
    assert kept(Maker()).stream.tolist() == [7, 8]


def test_small_text_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "LEAST", 14)
    kept(Maker())
    assert not folder.exists()
