r"""Conversations as a chat template writes them, in pieces that are learned and pieces that are only read.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n | Hello!<|im_end|> | \n
    ................................................ read .... | .... learned ... | read

Learned is what the model has to say once the template has asked for it: from behind the generation prompt to the end of
the end-of-turn marker. What the template itself puts before an answer (an empty <think> block) is only read; blanks
there are learned, because the model must write them. Where an answer lies is found by writing the conversation once
more with a word in its place that occurs nowhere else, so that neither the template's language nor its markers need be
known.

A template that writes earlier turns otherwise once a later one is there (Qwen 3 leaves out their thinking) makes
several documents of a conversation, one to an answer: each is what the model will have before it when it answers.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from lcprune.data.columns import Conversation, Message
from lcprune.errors import InputError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Learn: TypeAlias = Literal["answers", "all"]
Piece: TypeAlias = tuple[str, bool]
"""Text, and whether it is learned."""

TODAY = datetime(2024, 7, 26)
DAY = "26 Jul 2024"
"""What Llama 3's templates take for today, their own default: a run that is resumed tomorrow reads the same text."""
_FORMATS = {f"%{letter}": TODAY.strftime(f"%{letter}") for letter in "aAbBdHIjmMpSfwyYUWcxX"}
_FORMATS |= {f"%-{letter}": str(int(_FORMATS[f"%{letter}"])) for letter in "dmHIMSjy"}
_FORMATS |= {"%e": "26", "%h": "Jul", "%D": "07/26/24", "%F": "2024-07-26", "%R": "00:00", "%T": "00:00:00"}
_THE_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace({name!r}, {text!r})" for name, text in _FORMATS.items())
    + " }}{%- endmacro %}{{ '' }}"
)
"""Put before a template that asks transformers for the time: a macro goes before a function of the same name."""

_WORD = "Zq7answer7qZ"  # no blanks, which templates strip, and no markup
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A Jinja template that writes conversations: the tokenizer's own, or one from a file."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", file: Path | None = None) -> None:
        """Reads the template.

        Args:
            tokenizer: Whose special tokens it may name.
            file: Instead of the tokenizer's own.

        Raises:
            InputError: There is none.
        """
        self.tokenizer = tokenizer
        self._file = file
        source = _own(tokenizer) if file is None else file.read_text(encoding="utf-8")
        self._source = _THE_DAY + source if "strftime_now" in source else source

    @property
    def name(self) -> str:
        """Whose template it is, for messages."""
        return "the tokenizer's chat template" if self._file is None else f"data.chat_template={self._file}"

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template itself says, in {% generation %} blocks, what an assistant says."""
        return bool(_GENERATION.search(self._source))

    def write(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: The conversation.
            ask: Whether the model is asked to answer: the generation prompt at the end.

        Raises:
            InputError: The template refuses the conversation.
        """
        with self._refusals(messages):
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=ask,
                date_string=DAY,
            )
        assert isinstance(text, str)
        return text

    @contextmanager
    def _refusals(self, messages: Sequence[Message]) -> Iterator[None]:
        from jinja2 import TemplateError

        try:
            yield
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"{self.name} refuses a conversation of {roles} ({reason(error)}): mend the data, or name another "
                "template in data.chat_template."
            ) from error

    def marked(self, messages: Conversation) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation and which are learned, as the template itself marks them.

        Raises:
            InputError: It refuses the conversation, or marks something else than the last answer, or nothing.
        """
        with self._refusals(messages):
            encoded = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._source,
                return_dict=True,
                return_assistant_tokens_mask=True,
                date_string=DAY,
            )
        assert isinstance(encoded, Mapping)
        ids, learned = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
        said = str(self.tokenizer.decode([token for token, mark in zip(ids, learned, strict=True) if mark]))
        last = next(message["content"] for message in reversed(messages) if message["role"] == "assistant")
        # Decoded alone an answer may look otherwise than it was written: characters unknown to the tokenizer.
        again = str(self.tokenizer.decode(self.tokenizer(last, add_special_tokens=False)["input_ids"]))
        if _squeezed(again) not in _squeezed(said):
            raise InputError(
                f"{self.name} has a generation block, but what it marks ({said[:60]!r}) is not the assistant's "
                f"{last[:60]!r}: take the block out of the template, or name another in data.chat_template."
            )
        return ids, learned


def with_template(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> "PreTrainedTokenizerBase":
    """A tokenizer that writes conversations by a template; as it is where there is none."""
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def pieces_of(messages: Conversation, template: ChatTemplate, learn: Learn) -> list[list[Piece]]:
    """The documents of a conversation, each in pieces that make up its text.

    Args:
        messages: With an answer of an assistant.
        template: Without a generation block; those mark answers themselves.
        learn: The answers, or all of it.

    Raises:
        InputError: The template changes an answer, so that nobody can say what of it is learned.

    Example:
        [user "Hi", assistant "Hello!"]  ->  [[("<user>Hi<end><assistant>", False), ("Hello!<end>", True)]]
    """
    whole = template.write(messages)
    if learn == "all":
        return [[(whole, True)]]
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [_turn(messages[: place + 1], template) for place in answers]
    if all(whole.startswith(text[:end]) for text, _, end in turns):
        return [_cut(whole, [(begin, end) for _, begin, end in turns])]
    return [_cut(text, [(begin, end)]) for text, begin, end in turns]


def plain_pieces(messages: Conversation, eos: str) -> list[Piece]:
    """A prompt and its response for a tokenizer without a template: prompt, line break, response, end of text."""
    prompt, response = (message["content"] for message in messages)
    return [(f"{prompt}\n", False), (f"{response}{eos}", True)]


def _turn(messages: Sequence[Message], template: ChatTemplate) -> tuple[str, int, int]:
    """The text of a conversation that ends with an answer, and where in it the learned part begins and ends."""
    text = template.write(messages)
    asked = template.write(messages[:-1], ask=True) if len(messages) > 1 else ""
    answer = {name: value for name, value in messages[-1].items() if name in ("role", "content")}
    before, word, behind = template.write([*messages[:-1], {**answer, "content": _WORD}]).rpartition(_WORD)
    said = _said(text, before, behind, messages[-1]) if word else None
    if said is not None:
        begin = before
        if before.startswith(asked) and not before[len(asked) :].strip():
            begin = asked
        return _ended(text, len(begin), behind, template)
    # Thinking, which the template takes apart and puts together again: everything behind the generation prompt.
    if word and text.startswith(asked) and text.endswith(behind):
        body = _squeezed(text[len(asked) : len(text) - len(behind)])
        parts = [_squeezed(value) for name, value in messages[-1].items() if name != "role"]
        if body == parts[0] or (len(parts) > 1 and all(part in body for part in parts)):
            return _ended(text, len(asked), behind, template)
    raise InputError(
        f"{template.name} does not write the assistant's {messages[-1]['content'][:60]!r} as it stands, so that what "
        "is to be learned cannot be told: mend the data, or name another template in data.chat_template."
    )


def _said(text: str, before: str, behind: str, answer: Message) -> str | None:
    """The answer as it stands between what the template writes around any answer; None if it does not."""
    if set(answer) & {"reasoning_content", "thinking", "reasoning"}:
        return None
    whole = answer["content"]
    forms = dict.fromkeys((whole, whole.strip(), whole.lstrip(), whole.rstrip()))
    return next((form for form in forms if text == f"{before}{form}{behind}"), None)


def _ended(text: str, begin: int, behind: str, template: ChatTemplate) -> tuple[str, int, int]:
    """The learned part goes to the end of the end-of-turn marker; without one it gets the end of text."""
    if marker := behind.rstrip():
        return text, begin, len(text) - len(behind) + len(marker)
    eos = str(template.tokenizer.eos_token or "")
    return text + eos, begin, len(text + eos)


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    pieces: list[Piece] = []
    place = 0
    for begin, end in spans:
        pieces += [(text[place:begin], False), (text[begin:end], True)]
        place = end
    return [piece for piece in [*pieces, (text[place:], False)] if piece[0]]


def _own(tokenizer: "PreTrainedTokenizerBase") -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(
            f"data.tokenizer={tokenizer.name_or_path!r} has no chat template to write messages with: name a Jinja file "
            "in data.chat_template, or give the data as a column of prompts and one of responses, which need none."
        ) from error


def _squeezed(text: str) -> str:
    return "".join(text.split())
