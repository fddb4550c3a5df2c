"""Documents to blocks of equal length, in one of three ways.

    concatenate   [a a a a a b b b] [c c c c d d d d]    the running text, cut wherever a block is full
    separate      [a a a a a c c .] [b b b d d d d d]    whole documents, none of which sees another
    pad           [a a a a a . . .] [b b b . . . . .]    one document to a block

In `separate` position ids begin at 0 with every document; transformers makes of them the block-diagonal causal mask (or
flash attention's sequence lengths) when there is no attention mask. Documents go, longest first, where they leave least
room, and what stays open is filled up: every token of that sees itself alone and counts nowhere.

A document longer than a block is cut off in `separate` and `pad`; of plain text the rest goes on as a document of its
own, of a conversation it would be an answer without its question and is left out. `N` blocks, `T` tokens in a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lcprune.data.preprocess import pack
from lcprune.data.tokens import Tokens

Packing: TypeAlias = Literal["concatenate", "separate", "pad"]
Blocks: TypeAlias = Mapping[str, Tensor]
"""Always `input_ids` [N, T]; and only where it is not the same, int32 each:

`labels`, -100 where nothing is learned; `position_ids`, -1 where filled up; `attention_mask`, 0 where padded.
"""

FILLED = -1
"""Position of what a block is filled up with."""


@dataclass(frozen=True)
class Packed:
    """Blocks, and what became of the documents on the way."""

    blocks: Blocks
    """Of `block_size` tokens each."""
    documents: int
    """How many are in them."""
    tokens: int
    """How many of their tokens are in them."""
    learned: int
    """How many of those are learned: of every document that begins in a block, not the first."""
    left_out: int = 0
    """Documents with nothing to learn in them."""
    left: int = 0
    """Tokens at the end that are too few for a block."""

    def __len__(self) -> int:
        return len(self.blocks["input_ids"])

    def summary(self, long: int) -> str:
        """Blocks and what is in them, in words.

        Args:
            long: How many documents were longer than a block.
        """
        count, size = self.blocks["input_ids"].shape
        if "labels" not in self.blocks:
            return f"{count} blocks of {size} tokens, {self.left} tokens left over"
        words = [f"{count} blocks of {size} tokens", f"{self.learned / max(self.tokens, 1):.0%} of the tokens learned"]
        if self.blocks.keys() > {"input_ids", "labels"}:
            words += [f"{self.documents} documents", f"{self.tokens / max(count * size, 1):.0%} full"]
            words += [f"{long} documents longer than a block cut there"] if long else []
            words += [f"{self.left_out} documents without anything to learn left out"] if self.left_out else []
        else:
            words += [f"{self.left} tokens left over"]
        return ", ".join(words)


def packed(tokens: Tokens, block_size: int, packing: Packing, filler: int) -> Packed:
    """Packs documents.

    Args:
        tokens: The documents; none longer than a block, unless they are concatenated.
        block_size: T.
        packing: How.
        filler: The token that blocks are filled up with.
    """
    if packing == "concatenate":
        return _concatenated(tokens, block_size)
    useful = torch.tensor([bool(learned[1:].any()) for _, learned in tokens.documents()], dtype=torch.bool)
    kept = tokens.chosen(useful)
    lengths = kept.lengths.tolist()
    places = _best_fit(lengths, block_size) if packing == "separate" else [[number] for number in range(len(lengths))]
    blocks = _filled(kept, places, block_size, filler)
    if packing == "pad":
        blocks["attention_mask"] = (blocks.pop("position_ids") != FILLED).int()
    return Packed(
        blocks,
        documents=len(kept.lengths),
        tokens=len(kept.stream),
        learned=int((blocks["labels"] != -100).sum()),
        left_out=len(useful) - len(kept.lengths),
    )


def _concatenated(tokens: Tokens, block_size: int) -> Packed:
    input_ids, left = pack(tokens.stream, block_size)
    learned, _ = pack(tokens.learned, block_size)
    blocks = {"input_ids": input_ids}
    if not learned.all():
        blocks["labels"] = input_ids.masked_fill(~learned, -100)
    count = int((tokens.lengths.cumsum(0) <= input_ids.numel()).sum())
    return Packed(blocks, documents=count, tokens=input_ids.numel(), learned=int(learned[:, 1:].sum()), left=left)


def split_long(tokens: Tokens, block_size: int) -> Tokens:
    """Documents longer than a block become several."""
    sizes: list[int] = []
    for length in tokens.lengths.tolist():
        whole, rest = divmod(length, block_size)
        sizes += [block_size] * whole + [rest] * (rest > 0)
    return Tokens(tokens.stream, tokens.learned, torch.tensor(sizes, dtype=torch.int64))


def cut_long(tokens: Tokens, block_size: int) -> Tokens:
    """Documents longer than a block end with it."""
    starts = (tokens.lengths.cumsum(0) - tokens.lengths).repeat_interleave(tokens.lengths)
    mask = torch.arange(len(tokens.stream)) - starts < block_size
    return Tokens(tokens.stream[mask], tokens.learned[mask], tokens.lengths.clamp(max=block_size))


def _best_fit(lengths: Sequence[int], block_size: int) -> list[list[int]]:
    """Which documents share a block: longest first, each where it leaves least room; blocks in the documents' order."""
    blocks: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(block_size + 1)]  # tokens of room -> blocks
    rooms = 0  # bit r is set where a block has room for r tokens: the least that suffices is found in one step
    for document in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        length = lengths[document]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            block = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
            blocks[block].append(document)
        else:
            room, block = block_size, len(blocks)
            blocks.append([document])
        with_room[room - length].append(block)
        rooms |= 1 << (room - length)
    return sorted(map(sorted, blocks))


def _filled(tokens: Tokens, places: Sequence[Sequence[int]], block_size: int, filler: int) -> dict[str, Tensor]:
    shape = (len(places), block_size)
    input_ids = torch.full(shape, filler, dtype=torch.int32)
    labels = torch.full(shape, -100, dtype=torch.int32)
    positions = torch.full(shape, FILLED, dtype=torch.int32)
    documents = list(tokens.documents())
    for block, members in enumerate(places):
        ends = list(accumulate(len(documents[member][0]) for member in members))
        for member, end in zip(members, ends, strict=True):
            ids, learned = documents[member]
            span = slice(end - len(ids), end)
            input_ids[block, span] = ids
            labels[block, span] = ids.masked_fill(~learned, -100)
            labels[block, span.start] = -100  # nothing of its own document stands before it to predict it
            positions[block, span] = torch.arange(len(ids), dtype=torch.int32)
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions}


def batch_of(names: Sequence[str], rows: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """A batch as models take it, int64, of rows of `Blocks`.

    Args:
        names: What a row consists of, in order.
        rows: One tensor [T] for every name.

    Returns:
        `input_ids` and `labels` [B, T]; of packed documents `position_ids` and, bool, `counted`; of padded ones
        `attention_mask`, no longer than the longest of them.
    """
    columns = zip(*rows, strict=True)
    batch = {name: torch.stack(list(column)).long() for name, column in zip(names, columns, strict=True)}
    batch.setdefault("labels", batch["input_ids"].clone())
    if "position_ids" in batch:
        batch["counted"] = batch["position_ids"] != FILLED
        batch["position_ids"] = batch["position_ids"].clamp(min=0)
    if "attention_mask" in batch:
        longest = int(batch["attention_mask"].sum(1).max())
        batch = {name: tensor[:, :longest].contiguous() for name, tensor in batch.items()}
    return batch


def training_batch_of(names: Sequence[str], rows: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """As `batch_of`, with `scored` [N]: the numbers, among all B * T positions, of those whose next token is learned.

    How many there are decides the shapes of a loss. Found where the batch is made, a GPU need not be waited for.
    """
    batch = batch_of(names, rows)
    next_BT = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return {**batch, "scored": (next_BT != -100).flatten().nonzero().squeeze(1)}
