"""Which columns of a data set hold what, and what kind of document their rows are.

    text                          a document                                        text
    prompt, response              a question and what is to be said to it           pair
    messages                      [{"role": "user", "content": "..."}, ...]         chat

Columns that are named in the recipe are taken; otherwise they are found by what they are usually called, and said. Rows
of `from` and `value` (ShareGPT) are messages too, and content in parts of text is text. A pair is a conversation of two
messages; prompt and response may also be lists of messages, of one conversation.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeGuard

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
    """The column of plain text."""
    messages: str | None = None
    """The column of conversations."""
    prompt: str | None = None
    """The column of prompts."""
    response: str | None = None
    """The column of responses."""

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
    if kind == "pair" and isinstance(next((value for value in values[0] if value is not None), None), list):
        kind, values = "chat", [_in_a_row(*values)]  # prompts and completions that are messages themselves
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
        roles = ", ".join(dict.fromkeys(message["role"] for messages in whole for message in messages)) or "none"
        raise NothingThere(
            f"{source} holds no answer of an assistant in {', '.join(names)} (roles there: {roles}): give a file that "
            "has some, with the role assistant."
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


def _in_a_row(prompts: Iterable[object], responses: Iterable[object]) -> Iterator[object]:
    """The messages of a prompt and those of its response as one conversation; what is no list is left as it is."""
    for pair in zip(prompts, responses, strict=True):
        lists = [part or [] for part in pair if isinstance(part, list | None)]
        yield [*lists[0], *lists[1]] if len(lists) == len(pair) else pair


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
    items: list[object] = value if isinstance(value, list) else [None] if value is not None else []
    messages = []
    for item in items:
        if (message := _message(item)) is None:
            raise InputError(f"data.messages_column={column!r} of {source} {_not_a_message(item, number)}.")
        messages.append(message)
    return messages


def _message(item: object) -> Message | None:
    if not isinstance(item, dict) or (item.get("tool_calls") and not item.get("content")):
        return None
    message = {str(name): value for name, value in item.items() if isinstance(value, str)}
    if {"from", "value"} <= message.keys() and "role" not in message:
        role = message.pop("from")
        message |= {"role": ROLES.get(role, role), "content": message.pop("value")}
    if "content" in item and "content" not in message and (said := _said(item)) is not None:
        message["content"] = said
    return message if {"role", "content"} <= message.keys() else None


def _said(item: Mapping[object, object]) -> str | None:
    """The text of a message whose content is null or in parts; None if there is more to it than text."""
    content = item["content"]
    if content is None:
        return ""
    parts = [part.get("text") if _is_text(part) else None for part in content] if isinstance(content, list) else [None]
    return None if None in parts else "".join(map(str, parts))


def _is_text(part: object) -> TypeGuard[Mapping[object, object]]:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _not_a_message(item: object, number: int) -> str:
    if isinstance(item, Mapping) and isinstance(item.get("role"), str):
        if item.get("tool_calls") and not item.get("content"):
            return (
                f"calls a tool without a word in row {number}, which is not text to learn: write the call into content "
                "as the model shall say it, or leave such rows out"
            )
        if (
            isinstance(content := item.get("content"), list)
            and content
            and all(isinstance(each, Mapping) for each in content)
        ):
            kinds = dict.fromkeys(str(part.get("type")) for part in content if not _is_text(part))
            return f"holds {', '.join(kinds)} beside text in row {number}: leave such rows out, only text is read"
    return (
        f"does not hold a list of messages with the strings role and content in row {number}: bring it into that form, "
        "or name another column"
    )
