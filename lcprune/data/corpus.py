"""The text of a run in tokens: read, tokenised, divided, mixed, and no document longer than its block.

    sets of documents -> tokens -> training | validation -> shares by weight -> fitted -> Corpus

Plain text is learned whole; of conversations the answers are, unless the recipe says all. One set without chat is
packed as running text; with chat in it, documents are kept apart.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lcprune.data import store
from lcprune.data.chat import Learn
from lcprune.data.columns import Documents, Kind
from lcprune.data.mixture import shares
from lcprune.data.packing import Packing, cut_long, split_long
from lcprune.data.tokens import Tokens, divided, tokens_of
from lcprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reading:
    """How documents become tokens."""

    tokenizer: "PreTrainedTokenizerBase"
    """What turns the documents into tokens."""
    template: Path | None
    """A file with a chat template instead of the tokenizer's own."""
    learn: Learn | None
    """What of conversations; None = the answers."""
    packing: Packing | None
    """How blocks are made; None = as the kind of the text suggests."""
    block_size: int
    """Tokens in a block."""
    fraction: float
    """Of the tokens, for validation."""
    seed: int
    """Decides which documents are for validation, and which a mixture takes."""

    def tokens(self, documents: Documents) -> Tokens:
        """The documents in tokens; those of a large text are kept in the user's cache folder."""
        learn = self.learn or "answers"
        make = partial(self.once, documents)
        return store.kept(documents, self.tokenizer, template=self.template, learn=learn, make=make)

    def once(self, documents: Documents) -> Tokens:
        """The documents in tokens, of which nothing is kept."""
        return tokens_of(documents, self.tokenizer, template=self.template, learn=self.learn or "answers")

    def packing_of(self, kinds: Sequence[Kind]) -> Packing:
        """How documents of these kinds are packed.

        Raises:
            InputError: A setting for chat was given, and there is none.
        """
        if all(kind == "text" for kind in kinds):
            idle = [f"data.learn={self.learn}"] if self.learn == "answers" else []
            idle += [f"data.chat_template={self.template}"] if self.template is not None else []
            if idle:
                raise InputError(
                    f"{' and '.join(idle)}: plain text has no answers and is learned whole: drop it, or name the "
                    "columns of a chat with data.messages_column or data.prompt_column and data.response_column."
                )
            return self.packing or "concatenate"
        return self.packing or "separate"

    def fitted(self, tokens: Tokens, kind: Kind, packing: Packing) -> Tokens:
        """The same documents, none longer than a block where they are kept apart."""
        if packing == "concatenate":
            return tokens
        return split_long(tokens, self.block_size) if kind == "text" else cut_long(tokens, self.block_size)


@dataclass(frozen=True)
class Source:
    """One set of documents."""

    name: str
    """What it is called in messages."""
    documents: Documents
    """What is in it."""
    weight: float = 1.0
    """Its share beside the others."""


@dataclass(frozen=True)
class Corpus:
    """The text of a run in tokens, ready to be packed."""

    training: Tokens
    """What is trained on."""
    validation: Tokens
    """What is not."""
    packing: Packing
    """How it is to be packed."""
    long: dict[str, int]
    """Of `training` and `validation`: documents that were longer than a block."""
    kinds: tuple[Kind, ...]
    """What the documents of the sets are."""


def corpus_of(sources: Sequence[Source], held_out: Documents | None, reading: Reading) -> Corpus:
    """Makes the text of a run.

    Args:
        sources: Its sets; several are mixed by their weights.
        held_out: What is for validation; None = a part of every set.
        reading: How.

    Raises:
        InputError: There is nothing to hold out, or the settings do not fit the text.
    """
    kinds = tuple(source.documents.kind for source in sources)
    packing = reading.packing_of(kinds)
    whole = [_read(source, reading) for source in sources]
    if held_out is None:
        parts = [_divided(tokens, source, reading) for tokens, source in zip(whole, sources, strict=True)]
        training, validation = ([part[side] for part in parts] for side in (0, 1))
        held_kinds: Sequence[Kind] = kinds
    else:
        training, validation, held_kinds = whole, [_read(Source("validation", held_out), reading)], [held_out.kind]
    if len(sources) > 1:
        # A text without documents is one of any length: only pieces of it can be taken by weight.
        training, validation = (
            [
                split_long(tokens, reading.block_size) if kind == "text" else tokens
                for tokens, kind in zip(sets, of_kinds, strict=True)
            ]
            for sets, of_kinds in ((training, kinds), (validation, held_kinds))
        )
        training = _mixed(training, sources, reading.seed, "training")
        validation = _mixed(validation, sources, reading.seed, "validation") if held_out is None else validation

    def ready(sets: Sequence[Tokens], of_kinds: Sequence[Kind]) -> Tokens:
        return Tokens.joined(
            [reading.fitted(tokens, kind, packing) for tokens, kind in zip(sets, of_kinds, strict=True)]
        )

    return Corpus(
        ready(training, kinds),
        ready(validation, held_kinds),
        packing,
        {name: _long(sets, reading.block_size) for name, sets in (("training", training), ("validation", validation))},
        kinds,
    )


def say_columns(source: Source) -> None:
    """Tells which columns were taken, where they were not named, and what was left out."""
    documents = source.documents
    if documents.found:
        names = " and ".join(map(repr, documents.columns))
        what = {"chat": "conversations", "pair": "prompts and responses", "text": "text"}[documents.kind]
        fields = {"chat": "data.messages_column", "pair": "data.prompt_column and data.response_column"}
        rank_zero_info(f"{source.name}: {names} read as {what}; name others with {fields[documents.kind]}")
    if documents.beside:
        names = " and ".join(map(repr, documents.beside))
        rank_zero_info(
            f"{source.name}: {documents.columns[0]!r} read as plain text; for {names} instead set "
            "data.messages_column, or data.prompt_column and data.response_column"
        )
    if documents.left_out:
        rank_zero_info(f"{source.name}: {documents.left_out} rows without an answer left out")


def _read(source: Source, reading: Reading) -> Tokens:
    say_columns(source)
    try:
        return reading.tokens(source.documents)
    except InputError as error:
        raise InputError(f"{source.name}: {error}") from error


def _divided(tokens: Tokens, source: Source, reading: Reading) -> tuple[Tokens, Tokens]:
    if len(tokens.lengths) == 1 and source.documents.kind != "text":
        raise InputError(
            f"{source.name} holds one conversation, of which no part can be held out: name a data.validation_path, or "
            "give more."
        )
    return divided(
        tokens,
        fraction=reading.fraction,
        block_size=reading.block_size,
        seed=reading.seed,
        cut=source.documents.kind == "text",
    )


def _mixed(sets: Sequence[Tokens], sources: Sequence[Source], seed: int, part: str) -> list[Tokens]:
    chosen = shares([tokens.lengths for tokens in sets], [source.weight for source in sources], seed)
    mixed = [tokens.chosen(keep) for tokens, keep in zip(sets, chosen, strict=True)]
    total = sum(len(tokens.stream) for tokens in mixed)
    for source, before, after in zip(sources, sets, mixed, strict=True):
        rank_zero_info(
            f"mixture: {len(after.stream):,} of {len(before.stream):,} {part} tokens of {source.name}, "
            f"{len(after.stream) / total:.0%} of the whole"
        )
    return mixed


def _long(sets: Sequence[Tokens], block_size: int) -> int:
    limit = min(block_size, sys.maxsize)  # tensors know no larger numbers
    return sum(int((tokens.lengths > limit).sum()) for tokens in sets)


def filler_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that blocks are filled up with; it is neither learned nor seen by others."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if isinstance(token, int))
