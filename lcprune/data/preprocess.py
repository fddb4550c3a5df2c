"""Text to blocks: documents become one stream of tokens, the stream is cut into blocks of equal length.

    documents -> [a a a EOS b b EOS c ...] -> blocks  [a a a EOS] [b b EOS c] ...  + a remainder shorter than a block

Pure functions of their arguments. `N` blocks, `T` tokens in a block, `S` tokens in a stream. Tokens are kept as int32,
half the memory of int64; whoever makes a batch widens them.
"""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lcprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 1024
"""Documents handed to the tokenizer together; bounds the memory that Python lists of tokens take."""


def tokenize(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> tuple[Tensor, Tensor]:
    """Tokenises documents into one stream, each ended by the tokenizer's EOS.

    The special tokens that the tokenizer itself puts around a text (a BOS, say) are kept: the model has seen its
    documents with them. An EOS that it puts there is not doubled.

    Returns:
        The tokens [S], int32, and how many of them belong to each document, int64.

    Raises:
        InputError: The tokenizer has no EOS.

    Example:
        tokenize(["ab", "c"], tokenizer)  ->  tensor([a, b, EOS, c, EOS]), tensor([3, 2])
    """
    eos = eos_of(tokenizer)
    stream, lengths = array("i"), array("q")
    for start in range(0, len(documents), AT_ONCE):
        some = list(documents[start : start + AT_ONCE])
        for tokens in tokenizer(some, return_attention_mask=False, verbose=False)["input_ids"]:
            ended = tokens if tokens and tokens[-1] == eos else [*tokens, eos]
            stream.extend(ended)
            lengths.append(len(ended))
    return torch.tensor(stream, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int64)


def eos_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The tokenizer's end-of-text token.

    Raises:
        InputError: It has none.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise InputError(
            f"data.tokenizer={tokenizer.name_or_path!r} has no end-of-text token to set documents apart: "
            "name the tokenizer of a causal language model, or save this one with an eos_token."
        )
    return eos


def held_out(lengths: Tensor, wanted: int, seed: int) -> Tensor:
    """Draws documents until they have `wanted` tokens together; one always stays.

    Args:
        lengths: Tokens of every document, [N].
        wanted: Tokens.
        seed: Decides which.

    Returns:
        Which are drawn, bool [N].
    """
    order = _order(lengths, seed)
    count = int((lengths[order].cumsum(0) < wanted).sum()) + 1
    drawn = torch.zeros(len(lengths), dtype=torch.bool)
    drawn[order[: min(count, len(lengths) - 1)]] = True
    return drawn


def held_out_and_cut(lengths: Tensor, wanted: int, seed: int) -> tuple[Tensor, Tensor]:
    """As `held_out`, but nothing that would make it more than twice `wanted`, and more than a tenth of the whole.

    Such documents are passed over; if the others are not enough, the tail of the first one passed over is cut off.

    Returns:
        The lengths, of a document that is cut head and tail one behind the other, and which of these are drawn.

    Example:
        held_out_and_cut(tensor([90, 5, 5]), wanted=8, seed=0)  ->  tensor([90, 5, 5]), tensor([False, True, True])
    """
    drawn = held_out(lengths, wanted, seed)
    total, held = int(lengths.sum()), int(lengths[drawn].sum())
    most = max(2 * wanted, total // 10)
    if wanted <= held <= most or total <= most:
        return lengths, drawn
    drawn, missing, passed_over = torch.zeros_like(drawn), wanted, []
    for place in _order(lengths, seed).tolist():
        if missing <= 0:
            break
        length = int(lengths[place])
        if wanted - missing + length > most:
            passed_over.append((place, length))
        else:
            drawn[place] = True
            missing -= length
    if missing <= 0:
        return lengths, drawn
    place, length = passed_over[0]
    parts = torch.tensor([length - missing, missing])
    return (
        torch.cat([lengths[:place], parts, lengths[place + 1 :]]),
        torch.cat([drawn[:place], torch.tensor([False, True]), drawn[place + 1 :]]),
    )


def _order(lengths: Tensor, seed: int) -> Tensor:
    return torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))


def pack(stream: Tensor, block_size: int) -> tuple[Tensor, int]:
    """Cuts a stream [S] into blocks, in order.

    Returns:
        The blocks [N, T] with T = `block_size`, and how many tokens were left at the end, fewer than T.

    Example:
        pack(torch.arange(7), 3)  ->  tensor([[0, 1, 2], [3, 4, 5]]), 1
    """
    blocks = len(stream) // block_size
    width = min(block_size, 2**31)  # T; without a block any number may be asked for, and no tensor may be that wide
    return stream[: blocks * block_size].view(blocks, width), len(stream) - blocks * block_size
