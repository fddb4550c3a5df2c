"""A data module over conversations: what is said of them, what is learned, and what is refused."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from lcprune.data.module import TextDataModule
from lcprune.errors import InputError
from tests import builders
from tests.data import chats

Make = Callable[..., TextDataModule]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """Forty conversations of two turns, the last of them longer than a block."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"How many is {number}?"},
                {"role": "assistant", "content": f"{number} it is." + " And more." * 20 * (number == 39)},
            ]
        }
        for number in range(40)
    ]
    return write(tmp_path / "chat.jsonl", rows)


@pytest.fixture
def make(tiny_folder: Path) -> Make:
    def build(path: Path, **settings: object) -> TextDataModule:
        usual = {"tokenizer": str(tiny_folder), "block_size": 128, "batch_size": 1, "validation_fraction": 0.2}
        return TextDataModule(path=path, **usual | settings)  # type: ignore[arg-type]

    return build


def said(module: TextDataModule) -> set[str]:
    """What is learned of the training rows, decoded."""
    module.setup()
    tokenizer = builders.tiny_tokenizer()
    labels = [row for batch in module.train_dataloader() for row in batch["labels"]]
    return {text for row in labels for text in tokenizer.decode(row[row != -100]).split("<eos>") if text}


@pytest.mark.parametrize("packing", ["separate", "pad", "concatenate"])
def test_answers_alone_are_learned_whatever_the_packing(make: Make, chat: Path, packing: str):
    found = said(make(chat, packing=packing))
    answers = {f"{number} it is." for number in range(39)}
    assert len(found & answers) > 25
    if packing != "concatenate":  # where a block may end in the middle
        assert all(text in answers or text.startswith("39 it is. And more.") for text in found)


def test_everything_but_what_begins_a_document_is_learned_where_the_recipe_says_all(make: Make, chat: Path):
    module = make(chat, learn="all", packing="pad")
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert batch["labels"][0, 0] == -100
    assert batch["labels"][0, 1:].equal(batch["input_ids"][0, 1:])


def test_what_was_found_packed_and_cut_is_said(make: Make, chat: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        make(chat, seed=2).setup()
    assert "'messages' read as conversations; name others with data.messages_column" in caplog.text
    lines = [record.getMessage() for record in caplog.records]
    training = next(line for line in lines if line.startswith("training: "))
    assert "documents longer than a block cut there" in "".join(lines)
    assert "% of the tokens learned" in training


def test_own_template_writes_the_conversations(make: Make, chat: Path):
    module = make(chat, chat_template=chats.template("chatml"), packing="pad")
    tokenizer = builders.tiny_tokenizer()
    text = next(tokenizer.decode(ids) for ids, _ in module.read().training.documents())
    assert text.startswith("<|im_start|>user\nHow many is ")


def test_several_documents_of_plain_text_may_be_kept_apart(make: Make, tmp_path: Path):
    rows = write(tmp_path / "text.jsonl", [{"text": f"text {number} " * 30} for number in range(20)])
    module = make(rows, packing="separate")
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert (batch["position_ids"] == 0).sum() >= 1
    assert batch["labels"][batch["position_ids"] == 0].eq(-100).all()


def test_conversation_longer_than_what_is_held_out_goes_whole_to_one_side(make: Make, tmp_path: Path):
    answers = ["x" * 900, "yes", "yes", "yes", "yes"]
    rows = write(tmp_path / "few.jsonl", [{"prompt": "q", "response": answer} for answer in answers])
    corpus = make(rows, block_size=64).read()
    assert len(corpus.training.lengths) + len(corpus.validation.lengths) == len(answers)


def test_text_that_conversations_are_validated_on_is_validated_on_to_its_end(make: Make, chat: Path, tmp_path: Path):
    text = write(tmp_path / "text.jsonl", [{"text": "word " * 100}])
    corpus = make(chat, validation_path=text, validation_fraction=0.05, block_size=64).read()
    assert corpus.validation.lengths.tolist() == [64] * 7 + [53]  # of a conversation what passes a block is left out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learn": "answers"}, "data.learn=answers: plain text has no answers"),
        ({"chat_template": chats.template("chatml")}, "data.chat_template=.* plain text has no answers"),
    ],
)
def test_setting_for_chat_is_refused_where_there_is_none(
    make: Make, tmp_path: Path, settings: dict[str, object], words: str
):
    rows = write(tmp_path / "text.jsonl", [{"text": "some words"}] * 99)
    with pytest.raises(InputError, match=words):
        make(rows, **settings).setup()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chat_template": Path("nowhere.jinja")}, "chat_template=nowhere.jinja is not a file"),
        ({"prompt_column": "p"}, "prompt_column is set without data.response_column"),
        ({"messages_column": "a", "text_column": "b"}, "a row is one document"),
        ({"path": None, "messages_column": "a"}, "messages_column='a' does nothing for text without columns"),
    ],
)
def test_wrong_setting_is_refused_before_anything_is_read(make: Make, chat: Path, settings: dict, words: str):  # type: ignore[type-arg]
    with pytest.raises(InputError, match=words):
        make(**{"path": chat} | settings)


def test_single_conversation_has_no_part_to_hold_out(make: Make, tmp_path: Path):
    rows = write(tmp_path / "chat.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(InputError, match=r"holds one conversation.*data\.validation_path"):
        make(rows).setup()
    make(rows, validation_path=rows, validation_fraction=0.05).setup()


def test_answers_that_begin_behind_a_block_leave_nothing_to_learn(make: Make, tmp_path: Path):
    rows = write(tmp_path / "chat.jsonl", [{"prompt": "a" * 200, "response": "b"}] * 9)
    with pytest.raises(InputError, match=r"nothing to learn in the first data\.block_size=128 tokens"):
        make(rows).setup()


def test_conversation_that_no_template_can_write_is_named_with_its_file(make: Make, tmp_path: Path):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    rows = write(tmp_path / "chat.jsonl", [{"messages": messages}] * 3)
    with pytest.raises(
        InputError, match=r"chat\.jsonl: .*gemma\.jinja refuses a conversation of system, user, assistant"
    ):
        make(rows, chat_template=chats.template("gemma")).setup()
