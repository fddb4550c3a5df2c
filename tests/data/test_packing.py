"""Blocks hold whole documents, each once, and say where every one begins."""

import random
from itertools import pairwise

import pytest
import torch

from lcprune.data.packing import FILLED, Packed, Packing, batch_of, cut_long, packed, split_long
from lcprune.data.tokens import Tokens

FILLER = 9999


def some(lengths: list[int], prompt: int = 1) -> Tokens:
    """Documents of these lengths, of which all but `prompt` tokens are learned; every token is another."""
    marks = torch.cat([torch.arange(length) >= prompt for length in lengths])
    return Tokens(torch.arange(len(marks)).int(), marks, torch.tensor(lengths))


def documents_in(done: Packed) -> list[list[int]]:
    """The documents of all blocks, as the position ids say where they begin."""
    found = []
    for ids, positions in zip(done.blocks["input_ids"], done.blocks["position_ids"], strict=True):
        held = positions != FILLED
        assert bool((ids[~held] == FILLER).all())
        starts = [*(positions == 0).nonzero().flatten().tolist(), int(held.sum())]
        found += [ids[begin:end].tolist() for begin, end in pairwise(starts)]
    return found


def test_separate_packs_every_document_whole_and_once():
    lengths = random.Random(0).choices(range(2, 33), k=200)
    tokens = some(lengths)
    done = packed(tokens, 32, "separate", FILLER)
    assert sorted(documents_in(done)) == [ids.tolist() for ids, _ in tokens.documents()]
    assert done.tokens == sum(lengths)
    assert len(done) <= 1.05 * sum(lengths) / 32


def test_separate_puts_a_document_where_it_leaves_least_room_and_keeps_the_order_of_documents():
    done = packed(some([3, 6, 5, 2]), 8, "separate", FILLER)
    assert done.blocks["input_ids"].tolist() == [[0, 1, 2, 9, 10, 11, 12, 13], [3, 4, 5, 6, 7, 8, 14, 15]]
    assert done.blocks["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]]


@pytest.mark.parametrize("packing", ["separate", "pad"])
def test_nothing_is_learned_of_prompts_of_first_tokens_or_of_what_is_filled_up(packing: Packing):
    done = packed(some([4, 3], prompt=0), 8, packing, FILLER)
    first = done.blocks["labels"][0].tolist()
    assert first == ([-100, 1, 2, 3, -100, 5, 6, -100] if packing == "separate" else [-100, 1, 2, 3] + [-100] * 4)
    prompted = packed(some([4, 3], prompt=2), 8, packing, FILLER).blocks["labels"]
    assert sorted(prompted[prompted != -100].tolist()) == [2, 3, 6]


def test_documents_with_nothing_to_learn_are_left_out_and_counted():
    tokens = Tokens(torch.arange(5).int(), torch.tensor([True, False, False, False, True]), torch.tensor([3, 2]))
    done = packed(tokens, 4, "pad", FILLER)
    assert (done.documents, done.left_out, done.learned) == (1, 1, 1)
    assert done.blocks["input_ids"].tolist() == [[3, 4, FILLER, FILLER]]


def test_long_conversations_end_with_their_block_and_long_texts_go_on_as_another_document():
    tokens = some([10, 3])
    assert [ids.tolist() for ids, _ in cut_long(tokens, 4).documents()] == [[0, 1, 2, 3], [10, 11, 12]]
    assert [len(ids) for ids, _ in split_long(tokens, 4).documents()] == [4, 4, 2, 3]
    assert split_long(tokens, 4).stream.equal(tokens.stream)


def test_concatenate_masks_what_is_not_learned_and_nothing_else():
    plain = packed(some([5, 4], prompt=0), 4, "concatenate", FILLER)
    assert plain.blocks.keys() == {"input_ids"}
    assert plain.left == 1
    masked = packed(some([5, 4], prompt=2), 4, "concatenate", FILLER)
    assert masked.blocks["labels"].tolist() == [[-100, -100, 2, 3], [4, -100, -100, 7]]


def test_concatenate_counts_a_document_that_ends_with_the_last_block():
    done = packed(some([4, 4, 4, 4]), 8, "concatenate", FILLER)
    assert (done.documents, done.left) == (4, 0)


def test_padded_batch_is_as_long_as_its_longest_document():
    blocks = packed(some([4, 6, 3]), 16, "pad", FILLER).blocks
    batch = batch_of(tuple(blocks), list(zip(*blocks.values(), strict=True)))
    assert batch["attention_mask"].sum(1).tolist() == [4, 6, 3]
    assert {tensor.shape for tensor in batch.values()} == {(3, 6)}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_packed_batch_says_which_tokens_count():
    blocks = packed(some([4, 6]), 12, "separate", FILLER).blocks
    batch = batch_of(tuple(blocks), list(zip(*blocks.values(), strict=True)))
    assert batch.keys() == {"input_ids", "labels", "position_ids", "counted"}
    assert batch["counted"].tolist() == [[True] * 10 + [False] * 2]
    assert batch["position_ids"][0, -3:].tolist() == [5, 0, 0]
