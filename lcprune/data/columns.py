"""Which columns of a data set hold what, and what kind of document their rows are.

    text                          a document                                        text
    prompt, response              a question and what is to be said to it           pair
    messages                      [{"role": "user", "content": "..."}, ...]         chat

Columns that are named in the recipe are taken; otherwise they are found by what they are usually called, and said. Rows
of `from` and `value` (ShareGPT) are messages too. A pair is a conversation of two messages.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lcprune.errors import InputError

TEXT = "text"
"""The column of plain text, unless another is named."""
CHATS = ("messages", "conversations")
"""What a column of conversations is usually called."""
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"))
"""What two columns of prompts and responses are usually called."""
ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names for roles, and everyone else's."""

Kind: TypeAlias = Literal["text", "pair", "chat"]
Message: TypeAlias = dict[str, str]
"""`role`, `content`, and what else of strings a chat template may look at (`reasoning_content`)."""
Conversation: TypeAlias = Sequence[Message]
Rows: TypeAlias = Mapping[str, Iterable[object]]
"""Column -> its values."""


@dataclass(frozen=True)
class Columns:
    """The columns that are named; None = found by its usual name."""

    text: str = TEXT
    """Of plain text."""
    messages: str | None = None
    """Of conversations."""
    prompt: str | None = None
    """Of prompts."""
    response: str | None = None
    """Of what is to be said to them."""

    def mistakes(self) -> list[str]:
        """What is wrong with the names, in words."""
        if (self.prompt is None) != (self.response is None):
            given, other = ("prompt", "response") if self.response is None else ("response", "prompt")
            return [f"data.{given}_column is set without data.{other}_column: set both"]
        named = [
            f"data.{field}_column={name!r}"
            for field, name in (("messages", self.messages), ("prompt", self.prompt))
            if name is not None
        ]
        named += [f"data.text_column={self.text!r}"] if self.text != TEXT else []
        return [f"{' and '.join(named)} are set, but a row is one document: keep one"] if len(named) > 1 else []


class NothingThere(InputError):
    """Rows are what they should be, and nothing is in them."""


@dataclass(frozen=True)
class Documents:
    """The documents of one data set, all of one kind."""

    kind: Kind
    """What they are."""
    texts: Sequence[str] = ()
    """Where they are text."""
    conversations: Sequence[Conversation] = ()
    """Where they are conversations; pairs are some of two messages."""
    columns: tuple[str, ...] = ()
    """Where they were found."""
    found: bool = False
    """Whether the columns were found by their usual names and not named."""
    left_out: int = 0
    """Rows without an answer."""
    beside: tuple[str, ...] = ()
    """Columns that usually hold conversations, where text was read instead."""


def documents_of(rows: Rows, columns: Columns, source: str) -> Documents:
    """Reads rows as documents; those with nothing in them are left out.

    Args:
        rows: Column -> values, all equally many.
        columns: Those that are named.
        source: The setting that the rows come from, for the messages.

    Raises:
        InputError: A column is missing or holds something else.
        NothingThere: No row has text, or an answer.
    """
    kind, names, found = _chosen(set(rows), columns)
    missing = [name for name in names if name not in rows]
    if missing:
        field = {"text": "text", "chat": "messages"}.get(kind) or ("prompt" if missing[0] == names[0] else "response")
        holds = {"text": "text", "messages": "conversations"}.get(field, f"{field}s")
        raise InputError(
            f"data.{field}_column={missing[0]!r} is not in {source}, which has the columns {', '.join(rows)}: "
            f"set data.{field}_column to the one that holds the {holds}{_other_kinds(kind)}."
        )
    values = [rows[name] for name in names]
    if kind == "text":
        texts = texts_of(values[0], names[0], source)
        usual = [name for name in (*CHATS, *(name for pair in PAIRS for name in pair)) if name in rows]
        return Documents(kind, texts, columns=names, found=found, beside=tuple(usual) if columns == Columns() else ())
    if kind == "pair":
        whole = [_pair(number, pair, names, source) for number, pair in enumerate(zip(*values, strict=True))]
    else:
        whole = [_conversation(number, value, names[0], source) for number, value in enumerate(values[0])]
    kept = [conversation for conversation in whole if any(_is_answer(message) for message in conversation)]
    if not kept:
        raise NothingThere(
            f"{source} holds no answer of an assistant in {', '.join(names)}: give a file that has some."
        )
    return Documents(kind, conversations=kept, columns=names, found=found, left_out=len(whole) - len(kept))


def texts_of(values: Iterable[object], column: str, source: str) -> list[str]:
    """The texts of a column; empty ones are left out.

    Raises:
        InputError: A value is not text.
        NothingThere: There is none.
    """
    texts = []
    for value in values:
        if not isinstance(value, str | None):
            raise InputError(
                f"data.text_column={column!r} of {source} holds {type(value).__name__} values, not text: "
                "set data.text_column to a column of strings."
            )
        if value is not None and value.strip():
            texts.append(value)
    if not texts:
        raise NothingThere(f"{source} holds no text in data.text_column={column!r}: give a file or data set with text.")
    return texts


def _chosen(there: set[str], columns: Columns) -> tuple[Kind, tuple[str, ...], bool]:
    """Kind, columns, and whether they were found by their usual names."""
    if columns.messages is not None:
        return "chat", (columns.messages,), False
    if columns.prompt is not None and columns.response is not None:
        return "pair", (columns.prompt, columns.response), False
    if columns.text != TEXT or TEXT in there:
        return "text", (columns.text,), False
    for name in CHATS:
        if name in there:
            return "chat", (name,), True
    for pair in PAIRS:
        if there.issuperset(pair):
            return "pair", pair, True
    return "text", (columns.text,), False


def _other_kinds(kind: Kind) -> str:
    if kind != "text":
        return ""
    return ", or data.messages_column for chat, or data.prompt_column and data.response_column"


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


def _pair(number: int, values: Sequence[object], names: Sequence[str], source: str) -> Conversation:
    for value, name in zip(values, names, strict=True):
        if not isinstance(value, str | None):
            raise InputError(
                f"column {name!r} of {source} holds {type(value).__name__} in row {number}, not text: name columns of "
                "strings with data.prompt_column and data.response_column, or conversations with data.messages_column."
            )
    prompt, response = (str(value or "") for value in values)
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})


def _conversation(number: int, value: object, column: str, source: str) -> Conversation:
    messages = [_message(item) for item in value] if isinstance(value, list) else [None] if value is not None else []
    known = [message for message in messages if message is not None]
    if len(known) < len(messages):
        raise InputError(
            f"data.messages_column={column!r} of {source} does not hold a list of messages with the strings role and "
            f"content in row {number}: bring it into that form, or name another column."
        )
    return known


def _message(item: object) -> Message | None:
    if not isinstance(item, dict):
        return None
    message = {str(name): value for name, value in item.items() if isinstance(value, str)}
    if {"from", "value"} <= message.keys() and "role" not in message:
        role = message.pop("from")
        message |= {"role": ROLES.get(role, role), "content": message.pop("value")}
    return message if {"role", "content"} <= message.keys() else None
