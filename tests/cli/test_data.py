"""What `lcprune data` shows is what is learned, with colours and without."""

import json
from pathlib import Path

import pytest
import torch

from lcprune.cli import main
from lcprune.cli.previewing import LEARNED, marked
from tests import builders
from tests.cli.recipe import recipe, write


@pytest.fixture
def chat_recipe(tiny_folder: Path, tmp_path: Path) -> Path:
    rows = [{"ask": f"How many is {number}?", "say": f"{number} it is"} for number in range(40)]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    columns = {"data__prompt_column": "ask", "data__response_column": "say"}
    return write(tmp_path, recipe(tiny_folder, chat, tmp_path / "run", data__block_size=96, **columns))


def test_data_shows_answers_in_brackets_and_counts(chat_recipe: Path, capsys: pytest.CaptureFixture[str]):
    there = ["--trainer.accelerator", "cuda", "--trainer.devices", "8", "--trainer.strategy", "ddp"]  # but not here
    assert main(["data", "--config", str(chat_recipe), "--show", "2", *there]) == 0
    shown = capsys.readouterr().out
    assert "user: How many is 0?<eos>assistant: [[0 it is<eos>]]" in shown
    assert shown.count("[[") == 2
    assert "data.packing=separate" in shown
    counts = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in shown.splitlines() if "│" in line}
    assert sum(int(cell) for cell in counts["documents"]) == 40


def test_data_shows_that_plain_text_is_learned_whole_and_no_more_than_a_block_of_it(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = tmp_path / "text.txt"
    text.write_text("a b " * 200)
    assert main(["data", "--config", str(write(tmp_path, recipe(tiny_folder, text, tmp_path / "run")))]) == 0
    assert f"[[{'a b ' * 8}]] ... and" in capsys.readouterr().out


def test_data_makes_no_model(chat_recipe: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import PreTrainedModel

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    assert main(["data", "--config", str(chat_recipe)]) == 0


def test_data_refuses_a_number_of_documents_below_zero(chat_recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "--config", str(chat_recipe), "--show", "-1"]) == 2
    assert "--show -1 must be 0 or more" in capsys.readouterr().err


def test_marked_text_has_what_is_learned_in_colour_and_nothing_added():
    tokenizer = builders.tiny_tokenizer()
    ids = torch.tensor(tokenizer("ask[b]say")["input_ids"])
    text = marked(ids, torch.arange(len(ids)) >= 6, tokenizer, at_most=99, coloured=True)
    assert text.plain == "ask[b]say"
    learned = [text.plain[span.start : span.end] for span in text.spans if span.style == LEARNED]
    assert learned == ["say"]
    plain = marked(ids, torch.arange(len(ids)) >= 6, tokenizer, at_most=8, coloured=False).plain
    assert plain == "ask[b][[sa]] ... and 1 more tokens"
