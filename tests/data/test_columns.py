"""Columns are those that are named, else the usual ones; what is in them has to be what it should."""

import pytest

from lcprune.data.columns import Columns, documents_of
from lcprune.errors import InputError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR = {"prompt": ["p"], "response": ["r"]}


@pytest.mark.parametrize(
    ("rows", "columns", "kind", "used"),
    [
        ({"text": ["t"], "messages": [CHAT], **PAIR}, Columns(), "text", ("text",)),
        ({"id": [1], "messages": [CHAT], **PAIR}, Columns(), "chat", ("messages",)),
        ({"id": [1], **PAIR}, Columns(), "pair", ("prompt", "response")),
        ({"question": ["q"], "answer": ["a"]}, Columns(), "pair", ("question", "answer")),
        ({"text": ["t"], "messages": [CHAT]}, Columns(messages="messages"), "chat", ("messages",)),
        ({"text": ["t"], **PAIR}, Columns(prompt="prompt", response="response"), "pair", ("prompt", "response")),
        ({"body": ["t"], "messages": [CHAT]}, Columns("body"), "text", ("body",)),
    ],
)
def test_columns_that_are_named_count_before_text_and_text_before_what_is_found(rows, columns, kind, used):  # type: ignore[no-untyped-def]
    documents = documents_of(rows, columns, "here")
    assert (documents.kind, documents.columns) == (kind, used)
    assert documents.found == (columns == Columns() and kind != "text")


def test_conversations_that_text_was_read_instead_of_are_told():
    rows = {"text": ["t"], "messages": [CHAT], "id": [1]}
    assert documents_of(rows, Columns(), "here").beside == ("messages",)
    assert documents_of({"text": ["t"], "id": [1]}, Columns(), "here").beside == ()


def test_pair_is_a_conversation_of_a_question_and_an_answer():
    (conversation,) = documents_of(PAIR, Columns(), "here").conversations
    assert list(conversation) == [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]


def test_sharegpt_names_are_messages_and_what_is_no_text_in_them_is_left_out():
    rows = {"conversations": [[{"from": "human", "value": "a", "weight": None}, {"from": "gpt", "value": "b"}]]}
    assert list(documents_of(rows, Columns(), "here").conversations[0]) == CHAT


def test_content_in_parts_of_text_is_their_text_and_null_is_none():
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "", "image_url": None}]
    rows = {"messages": [[{"role": "system", "content": None}, CHAT[0], {"role": "assistant", "content": parts}]]}
    (conversation,) = documents_of(rows, Columns(), "here").conversations
    assert list(conversation) == [{"role": "system", "content": ""}, *CHAT]


def test_prompts_and_completions_of_messages_are_one_conversation_each():
    rows = {"prompt": [None, CHAT[:1]], "completion": [CHAT[1:], CHAT[1:]]}
    documents = documents_of(rows, Columns(), "here")
    assert (documents.kind, documents.columns) == ("chat", ("prompt", "completion"))
    assert [list(conversation) for conversation in documents.conversations] == [CHAT[1:], CHAT]


def test_rows_without_an_answer_are_left_out_and_counted():
    rows = {"prompt": ["p", "p", "p"], "response": ["r", " ", None]}
    documents = documents_of(rows, Columns(), "here")
    assert (len(documents.conversations), documents.left_out) == (1, 2)


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        ({"messages": [CHAT]}, Columns(messages="chat"), r"data\.messages_column='chat' is not in here.* messages"),
        (PAIR, Columns(prompt="prompt", response="said"), r"data\.response_column='said' is not in here"),
        ({"messages": [CHAT, "hello"]}, Columns(), "does not hold a list of messages .* in row 1"),
        ({"messages": [[{"role": "user"}]]}, Columns(), "strings role and content in row 0"),
        ({"prompt": ["p"], "response": [["r"]]}, Columns(), "column 'response' of here holds list in row 0"),
        ({"messages": [CHAT[:1]]}, Columns(), r"holds no answer of an assistant in messages \(roles there: user\)"),
        (
            {"messages": [[{"role": "Human", "content": "a"}, {"role": "Bot", "content": "b"}]]},
            Columns(),
            r"\(roles there: Human, Bot\): give a file that has some, with the role assistant",
        ),
        (
            {"messages": [[CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]]},
            Columns(),
            "calls a tool without a word in row 0.* leave such rows out",
        ),
        (
            {"messages": [CHAT, [{"role": "user", "content": [{"type": "image_url", "text": None}]}, CHAT[1]]]},
            Columns(),
            "holds image_url beside text in row 1: leave such rows out",
        ),
        ({"prompt": [CHAT[:1]], "completion": ["b"]}, Columns(), "does not hold a list of messages .* in row 0"),
        ({"id": [1]}, Columns(), r"columns id.*data\.messages_column for chat"),
    ],
)
def test_column_that_is_missing_or_holds_something_else_is_named(rows, columns, words):  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=words):
        documents_of(rows, columns, "here")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (Columns(prompt="p"), "prompt_column is set without data.response_column"),
        (Columns(response="r"), "response_column is set without data.prompt_column"),
        (Columns(messages="m", prompt="p", response="r"), "messages_column='m' and data.prompt_column='p' are set"),
        (Columns("body", messages="m"), "messages_column='m' and data.text_column='body' are set"),
    ],
)
def test_names_that_do_not_go_together_are_mistakes(columns: Columns, words: str):
    (mistake,) = columns.mistakes()
    assert words in mistake
