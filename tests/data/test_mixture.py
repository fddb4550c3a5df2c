"""Shares of a mixture are those of its weights, drawn once by the seed, nothing repeated."""

import json
from pathlib import Path

import pytest
import torch

from lcprune.data.mixture import Part, shares
from lcprune.data.module import TextDataModule
from lcprune.errors import InputError
from lcprune.models import load_tokenizer


def taken(masks: list[torch.Tensor], lengths: list[torch.Tensor]) -> list[int]:
    return [int(each[mask].sum()) for each, mask in zip(lengths, masks, strict=True)]


def test_set_that_is_shortest_for_its_weight_is_whole_and_the_others_have_their_shares():
    lengths = [torch.full((100,), 9), torch.full((1000,), 5), torch.full((50,), 40)]
    assert taken(shares(lengths, [2, 1, 0.5], seed=0), lengths) == [900, 450, 240]
    assert taken(shares(lengths, [1, 1, 5], seed=0), lengths) == [396, 400, 2000]


def test_shares_are_a_function_of_the_seed():
    lengths = [torch.full((100,), 9), torch.full((1000,), 5)]
    one, same, other = (shares(lengths, [1, 1], seed=seed)[1] for seed in (0, 0, 1))
    assert one.equal(same)
    assert not one.equal(other)


def test_every_set_has_at_least_one_document():
    assert shares([torch.tensor([1000]), torch.tensor([2])], [1, 1], seed=0)[0].tolist() == [True]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "name a path or a dataset"),
        ({"path": Path("a.jsonl"), "dataset": "b"}, "and not both"),
        ({"path": Path("a.jsonl"), "split": "test"}, "belong to a dataset"),
        ({"path": Path("a.jsonl"), "weight": 0.0}, "weight=0.0 must be greater than 0"),
        ({"path": Path("a.jsonl"), "prompt_column": "p"}, "without data.response_column"),
    ],
)
def test_wrong_part_is_refused(settings: dict[str, object], words: str):
    with pytest.raises(InputError, match=words):
        Part(**settings)  # type: ignore[arg-type]


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    """Chat and text, the same number of documents."""
    chat, text = tmp_path / "chat.jsonl", tmp_path / "text.jsonl"
    chat.write_text("\n".join(json.dumps({"prompt": f"ask {n:03}", "response": "x" * 9}) for n in range(200)))
    text.write_text("\n".join(json.dumps({"text": f"text {n:03} " * 3}) for n in range(200)))
    return [Part(path=chat, weight=2), Part(path=text, weight=1)]


def test_mixture_of_chat_and_text_learns_the_answers_of_one_and_all_of_the_other(parts: list[Part], tiny_folder: Path):
    module = TextDataModule(tokenizer=str(tiny_folder), mixture=parts, block_size=64, validation_fraction=0.2)
    corpus = module.read()
    assert corpus.packing == "separate"
    shown = {bool(learned.all()) for _, learned in corpus.training.documents()}
    assert shown == {True, False}
    for part, tolerance in ((corpus.training, 0.01), (corpus.validation, 0.1)):
        text = sum(len(ids) for ids, learned in part.documents() if bool(learned.all()))
        assert text / len(part.stream) == pytest.approx(1 / 3, abs=tolerance)


def test_file_of_one_text_is_mixed_by_its_weight(tmp_path: Path, tiny_folder: Path):
    for name, letter in (("one", "a"), ("two", "b")):
        (tmp_path / f"{name}.txt").write_text(f"{letter} " * 4_000)
    parts = [Part(path=tmp_path / "one.txt", weight=3), Part(path=tmp_path / "two.txt", weight=1)]
    corpus = TextDataModule(tokenizer=str(tiny_folder), mixture=parts, block_size=64).read()
    for part, tolerance in ((corpus.training, 0.02), (corpus.validation, 0.15)):  # a token is a character here
        letters = load_tokenizer(str(tiny_folder)).decode(part.stream)
        assert letters.count("b") / (letters.count("a") + letters.count("b")) == pytest.approx(1 / 4, abs=tolerance)


def test_mixture_beside_another_source_or_of_one_part_is_refused(parts: list[Part], tiny_folder: Path):
    with pytest.raises(InputError, match="are both set"):
        TextDataModule(tokenizer=str(tiny_folder), mixture=parts, dataset="some/set")
    with pytest.raises(InputError, match="fewer than two parts"):
        TextDataModule(tokenizer=str(tiny_folder), mixture=parts[:1])
    with pytest.raises(InputError, match="text_column='body' belongs into the parts"):
        TextDataModule(tokenizer=str(tiny_folder), mixture=parts, text_column="body")
    with pytest.raises(InputError, match="does not exist"):
        TextDataModule(tokenizer=str(tiny_folder), mixture=[parts[0], Part(path=Path("nowhere.jsonl"))])
