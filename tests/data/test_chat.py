"""What is learned of a conversation is what the assistant says, whatever template writes it."""

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lcprune.data.chat import ChatTemplate
from lcprune.data.columns import Conversation, Documents
from lcprune.data.tokens import Tokens, tokens_of
from lcprune.errors import InputError
from tests import builders
from tests.data import chats
from tests.data.chats import ANSWERS, CHAT, MARKERS


@pytest.fixture(scope="module", params=["characters", "merges"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return getattr(chats, request.param)()


def tokens(
    tokenizer: PreTrainedTokenizerFast, template: Path | None, *conversations: Conversation, learn: str = "answers"
) -> Tokens:
    documents = Documents("chat", conversations=conversations)
    return tokens_of(documents, tokenizer, template=template, learn=learn)  # type: ignore[arg-type]


def learned(tokenizer: PreTrainedTokenizerFast, found: Tokens) -> list[list[str]]:
    """Every document's runs of learned tokens, decoded."""
    documents = []
    for ids, marks in found.documents():
        changes = torch.diff(marks.int(), prepend=torch.tensor([0]), append=torch.tensor([0])).nonzero().flatten()
        runs = [ids[begin:end].tolist() for begin, end in changes.view(-1, 2)]
        documents.append([tokenizer.decode(run) for run in runs])
    return documents


def test_what_a_template_takes_for_today_is_the_same_tomorrow(tmp_path: Path):
    file = tmp_path / "dated.jinja"
    now = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }} {{ strftime_now('%-d') ~ '.' }}"
    file.write_text(f"{now} {{{{ date_string }}}} {{{{ messages[0].content }}}}")
    expected = f"26 Jul 2024 00:00:00.000000 26. 26 Jul 2024 {CHAT[0]['content']}"
    assert ChatTemplate(chats.characters(), file).write(CHAT) == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen2.5", "gemma"])
def test_learned_tokens_are_the_answers_and_their_end_of_turn_markers(tokenizer: PreTrainedTokenizerFast, name: str):
    found = tokens(tokenizer, chats.template(name), CHAT)
    assert learned(tokenizer, found) == [[answer + MARKERS[name] for answer in ANSWERS]]


def test_learned_tokens_of_mistral_are_the_answers_behind_the_space_that_its_template_makes_the_model_write(
    tokenizer: PreTrainedTokenizerFast,
):
    found = tokens(tokenizer, chats.template("mistral"), CHAT)
    assert learned(tokenizer, found) == [[f" {answer}</s>" for answer in ANSWERS]]


def test_learned_tokens_of_qwen3_are_the_answers_each_in_a_document_without_what_is_left_out_of_earlier_turns(
    tokenizer: PreTrainedTokenizerFast,
):
    found = tokens(tokenizer, chats.template("qwen3"), CHAT)
    assert learned(tokenizer, found) == [[answer + "<|im_end|>"] for answer in ANSWERS]
    texts = [tokenizer.decode(ids) for ids, _ in found.documents()]
    chat = ChatTemplate(tokenizer, chats.template("qwen3"))
    assert texts == [chat.write(CHAT[:2]), chat.write(CHAT)]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"content": "<think>\nHm.\n</think>\n\n24"}, "<think>\nHm.\n</think>\n\n24<|im_end|>"),
        ({"content": "<think>Hm.</think>24"}, "<think>\nHm.\n</think>\n\n24<|im_end|>"),
        ({"content": "24", "reasoning_content": "Hm."}, "<think>\nHm.\n</think>\n\n24<|im_end|>"),
        ({"content": "think"}, "think<|im_end|>"),
        ({"content": "\n"}, None),
    ],
)
def test_thinking_is_learned_where_there_is_some_and_an_empty_block_is_not(
    tokenizer: PreTrainedTokenizerFast, answer: dict[str, str], said: str | None
):
    chat = (CHAT[0], {"role": "assistant", **answer})
    found = tokens(tokenizer, chats.template("qwen3"), chat)
    assert learned(tokenizer, found) == [[said if said is not None else "\n<|im_end|>"]]


@pytest.mark.parametrize("name", MARKERS)
def test_tokens_of_a_conversation_are_what_the_template_writes(tokenizer: PreTrainedTokenizerFast, name: str):
    text = ChatTemplate(tokenizer, chats.template(name)).write(CHAT)
    for learn in ("answers", "all"):
        *_, (ids, marks) = tokens(tokenizer, chats.template(name), CHAT, learn=learn).documents()
        assert tokenizer.decode(ids) == text
        assert bool(marks.all()) == (learn == "all")


def test_answer_whose_first_token_reaches_into_the_prompt_is_tokenised_apart():
    tokenizer = chats.merges()
    assert len(tokenizer("\n\n\n")["input_ids"]) < 3
    chat = (CHAT[0], {"role": "assistant", "content": "\n\nTwo"})
    found = tokens(tokenizer, chats.template("chatml"), chat)
    assert learned(tokenizer, found) == [["\n\nTwo<|im_end|>"]]


def test_template_without_a_marker_ends_a_conversation_with_the_end_of_text(tmp_path: Path):
    tokenizer, template = chats.characters(), tmp_path / "bare.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    assert learned(tokenizer, tokens(tokenizer, template, CHAT[:2])) == [[f"{ANSWERS[0]}\n</s>"]]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content | upper + ';' }}{% endfor %}", "does not write the ass"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "does not write the assistant's"),
        ("{{ raise_exception('no turns') }}", r"refuses a conversation of user, assistant \(no turns\)"),
        ("{% for m in messages %}{% endif %}", "refuses a conversation of user, assistant"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "but what it marks"),
        (
            "{% generation %}{{ raise_exception('no turns') }}{% endgeneration %}",
            r"refuses a conversation .*\(no turns\)",
        ),
    ],
)
def test_template_that_changes_or_refuses_an_answer_is_refused(tmp_path: Path, template: str, words: str):
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    with pytest.raises(InputError, match=words):
        tokens(chats.characters(), file, CHAT[:2])


def test_template_with_a_generation_block_says_itself_what_is_learned():
    tokenizer = builders.tiny_tokenizer()
    found = tokens(tokenizer, None, CHAT)
    assert learned(tokenizer, found) == [[f"{answer}<eos>" for answer in ANSWERS]]


def test_template_that_writes_the_date_writes_the_same_every_day(tmp_path: Path):
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ date_string or strftime_now('%d %b %Y') }}{% for m in messages %};{{ m.content }};{% endfor %}"
    )
    (ids, _), *_ = tokens(chats.characters(), template, CHAT[:2]).documents()
    assert chats.characters().decode(ids).startswith("26 Jul 2024;")


def test_tokenizer_without_a_template_is_told_both_ways_out():
    with pytest.raises(InputError, match=r"no chat template.*data\.chat_template.*column of prompts"):
        tokens(chats.characters(), None, CHAT)


def test_pair_without_a_template_is_prompt_line_break_response_and_end_of_text():
    tokenizer = chats.characters()
    documents = Documents("pair", conversations=[CHAT[:2]])
    found = tokens_of(documents, tokenizer, template=None, learn="answers")
    assert tokenizer.decode(found.stream) == f"How many clips?\n{ANSWERS[0]}</s>"
    assert learned(tokenizer, found) == [[f"{ANSWERS[0]}</s>"]]


def test_pair_without_a_template_does_not_begin_with_the_end_of_text_that_a_tokenizer_puts_behind_a_text():
    tokenizer = chats.characters()
    ends = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=ends)
    documents = Documents("pair", conversations=[CHAT[:2]])
    found = tokens_of(documents, tokenizer, template=None, learn="answers")
    assert tokenizer.decode(found.stream) == f"How many clips?\n{ANSWERS[0]}</s>"


def test_characters_that_the_tokenizer_does_not_know_do_not_move_what_is_learned():
    tokenizer = chats.characters()
    chat = ({"role": "user", "content": "wie viele? ä"}, {"role": "assistant", "content": "zwölf ☃"})
    found = tokens(tokenizer, chats.template("chatml"), chat)
    assert learned(tokenizer, found) == [["zw?lf ?<|im_end|>"]]
