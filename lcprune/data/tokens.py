"""Documents as tokens, and which of them are learned.

    stream   [a a a a a | b b b | c c c c ...]   documents one behind the other, [S] int32
    learned  [. . x x x | . x x | x x x x ...]   [S] bool
    lengths  [5, 3, ...]                         [N] int64

A conversation is tokenised as a whole, as the template's text would be. Where a token would lie across the beginning or
the end of what is learned, the pieces are tokenised one by one instead, as they are when the model is asked: the
learned tokens, decoded, are always what was to be learned. `S` tokens in a stream, `N` documents.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lcprune.data.chat import ChatTemplate, Learn, Piece, pieces_of, plain_pieces
from lcprune.data.columns import Conversation, Documents
from lcprune.data.preprocess import AT_ONCE, eos_of, held_out, held_out_and_cut, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """Documents in tokens."""

    stream: Tensor
    """All tokens [S], int32."""
    learned: Tensor
    """Which are learned, bool [S]."""
    lengths: Tensor
    """How many belong to each document, int64 [N]."""

    def documents(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and which are learned, document by document."""
        sizes = self.lengths.tolist()
        return zip(self.stream.split(sizes), self.learned.split(sizes), strict=True)

    def chosen(self, keep: Tensor) -> "Tokens":
        """The documents that `keep`, bool [N], says, in order."""
        mask = keep.repeat_interleave(self.lengths)
        return Tokens(self.stream[mask], self.learned[mask], self.lengths[keep])

    def between(self, begin: int, end: int) -> "Tokens":
        """Tokens `begin` .. `end` - 1 of the stream as one document."""
        lengths = torch.tensor([end - begin] if end > begin else [], dtype=torch.int64)
        return Tokens(self.stream[begin:end], self.learned[begin:end], lengths)

    @classmethod
    def joined(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """The documents of all parts, one part behind the other."""
        names = ("stream", "learned", "lengths")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def tokens_of(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", *, template: Path | None, learn: Learn
) -> Tokens:
    """Tokenises documents of any kind.

    Args:
        documents: Of text, all of which is learned, or conversations.
        tokenizer: Whose tokens.
        template: A file with a chat template instead of the tokenizer's own.
        learn: What of a conversation.

    Raises:
        InputError: There is no chat template for a conversation, or it does not fit it.
    """
    if documents.kind == "text":
        stream, lengths = tokenize(documents.texts, tokenizer)
        return Tokens(stream, torch.ones(len(stream), dtype=torch.bool), lengths)
    if documents.kind == "pair" and template is None and not tokenizer.chat_template:
        return _gathered(_plain(documents.conversations, tokenizer, learn))
    chat = ChatTemplate(tokenizer, template)
    if chat.marks_answers and learn == "answers":
        return _gathered(map(chat.marked, documents.conversations))
    pieces = (each for messages in documents.conversations for each in pieces_of(messages, chat, learn))
    return _gathered(encoded(pieces, tokenizer))


def divided(tokens: Tokens, *, fraction: float, block_size: int, seed: int, cut: bool = True) -> tuple[Tokens, Tokens]:
    """Divides documents into those for training and those for validation.

    Whole documents, drawn by the seed, go to validation until it has `fraction` of the tokens and at least one block;
    one document always stays for training. A single document is cut instead: its tail is for validation. So is one that
    is much longer than what is to be held out, where others are not enough.

    Args:
        tokens: The documents.
        fraction: Of the tokens, between 0 and 1.
        block_size: Tokens in a block.
        seed: Decides which documents.
        cut: Whether documents may be cut; conversations may not.

    Returns:
        Both parts, in the documents' order; together they are the whole.
    """
    total = len(tokens.stream)
    wanted = min(max(round(total * fraction), block_size), total)  # tensors know no larger numbers
    if len(tokens.lengths) == 1:
        head = max(total - wanted, min(block_size, total))
        return tokens.between(0, head), tokens.between(head, total)
    if not cut:
        drawn = held_out(tokens.lengths, wanted, seed)
    else:
        lengths, drawn = held_out_and_cut(tokens.lengths, wanted, seed)
        tokens = Tokens(tokens.stream, tokens.learned, lengths)
    return tokens.chosen(~drawn), tokens.chosen(drawn)


def encoded(
    documents: Iterable[list[Piece]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[list[int], list[bool]]]:
    r"""Tokens of documents in pieces, and which are learned; no special tokens but those in the text.

    Args:
        documents: Each in pieces that make up its text.
        tokenizer: Whose tokens.

    Example:
        [[("Q:\n", False), ("b<eos>", True)]]  ->  ([Q, :, \n, b, <eos>], [False, False, False, True, True])
    """
    batch: list[list[Piece]] = []
    for document in documents:
        batch.append(document)
        if len(batch) == AT_ONCE:
            yield from _encoded(batch, tokenizer)
            batch = []
    if batch:
        yield from _encoded(batch, tokenizer)


def _encoded(
    documents: Sequence[list[Piece]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[list[int], list[bool]]]:
    if not tokenizer.is_fast:  # which cannot say where in the text its tokens lie
        yield from (_one_by_one(document, tokenizer) for document in documents)
        return
    whole = tokenizer(
        ["".join(text for text, _ in document) for document in documents],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for document, ids, places in zip(documents, whole["input_ids"], whole["offset_mapping"], strict=True):
        learned = _learned(document, ids, places, tokenizer)
        yield (ids, learned) if learned is not None else _one_by_one(document, tokenizer)


def _learned(
    document: list[Piece], ids: list[int], places: Sequence[tuple[int, int]], tokenizer: "PreTrainedTokenizerBase"
) -> list[bool] | None:
    """Which tokens are learned; None where a token lies in what is learned and in what is not."""
    learned = [False] * len(ids)
    end = first = 0
    for text, wanted in document:
        start, end = first, end + len(text)
        while first < len(ids) and places[first][0] < end:
            first += 1
        if wanted:
            if not _says(ids[start:first], text, tokenizer):
                return None
            learned[start:first] = [True] * (first - start)
    return learned if first == len(ids) else None


def _says(ids: list[int], text: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether these tokens are this text, as far as the tokenizer can write it at all."""
    said = _decoded(ids, tokenizer)
    if said == text or said == text.lstrip(" "):  # some tokenizers leave out the space that a text begins with
        return True
    return said == _decoded(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer)


def _decoded(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _one_by_one(document: list[Piece], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    learned: list[bool] = []
    for text, wanted in document:
        piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += piece
        learned += [wanted] * len(piece)
    return ids, learned


def _plain(
    conversations: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase", learn: Learn
) -> Iterator[tuple[list[int], list[bool]]]:
    """Pairs without a template, behind what the tokenizer itself begins a text with."""
    eos = eos_of(tokenizer)
    begins = tokenizer("", verbose=False)["input_ids"]
    before = begins[:-1] if begins and begins[-1] == eos else begins
    pieces = (plain_pieces(messages, str(tokenizer.eos_token)) for messages in conversations)
    for ids, learned in encoded(pieces, tokenizer):
        yield [*before, *ids], [learn == "all"] * len(before) + [learn == "all" or each for each in learned]


def _gathered(documents: Iterable[tuple[list[int], list[bool]]]) -> Tokens:
    stream, learned, lengths = array("i"), array("b"), array("q")
    for ids, marks in documents:
        stream.extend(ids)
        learned.extend(marks)
        lengths.append(len(ids))
    return Tokens(
        torch.tensor(stream, dtype=torch.int32),
        torch.tensor(learned, dtype=torch.bool),
        torch.tensor(lengths, dtype=torch.int64),
    )
