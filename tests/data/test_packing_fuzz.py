"""Whatever the documents: every token lies in its place, is learned once or not at all, and is counted rightly."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcprune.data.packing import FILLED, Packing, batch_of, cut_long, packed, split_long
from lcprune.data.tokens import Tokens
from tests.data.test_packing import FILLER, documents_in

sizes = st.integers(2, 12)


@st.composite
def documents(draw: st.DrawFn) -> Tokens:
    """Of 1 to 30 tokens, all different, of which any are learned."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    learned = draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    return Tokens(torch.arange(sum(lengths)).int(), torch.tensor(learned), torch.tensor(lengths))


def taught(tokens: Tokens) -> set[int]:
    """Tokens that are learned: each is its own number; the first of a document has nothing before it."""
    return {int(token) for ids, learned in tokens.documents() for token in ids[1:][learned[1:]]}


@settings(max_examples=150, deadline=None)
@given(documents(), sizes, st.sampled_from(["separate", "pad"]))
def test_every_document_with_something_to_learn_is_there_whole_and_once(tokens: Tokens, size: int, packing: Packing):
    tokens = split_long(tokens, size) if packing == "separate" else cut_long(tokens, size)
    done = packed(tokens, size, packing, FILLER)
    whole = [ids.tolist() for ids, learned in tokens.documents() if bool(learned[1:].any())]
    if packing == "separate":
        assert sorted(documents_in(done)) == whole
    else:
        rows = zip(done.blocks["input_ids"], done.blocks["attention_mask"], strict=True)
        assert [ids[mask.bool()].tolist() for ids, mask in rows] == whole
    labels = done.blocks["labels"]
    there = labels != -100
    assert sorted(labels[there].tolist()) == sorted(taught(tokens))
    assert bool((labels[there] == done.blocks["input_ids"][there]).all())
    assert (done.documents, done.tokens, done.learned) == (len(whole), sum(map(len, whole)), int(there.sum()))
    assert done.documents + done.left_out == len(tokens.lengths)


@settings(max_examples=100, deadline=None)
@given(documents(), sizes)
def test_concatenated_text_is_the_running_text(tokens: Tokens, size: int):
    done = packed(tokens, size, "concatenate", FILLER)
    count = len(tokens.stream) // size
    assert done.blocks["input_ids"].flatten().tolist() == list(range(count * size))
    assert done.left == len(tokens.stream) - count * size
    if "labels" in done.blocks:
        learned = tokens.learned[: count * size].view(count, size)
        assert (done.blocks["labels"] != -100).equal(learned)


@settings(max_examples=100, deadline=None)
@given(documents(), sizes)
def test_no_token_of_a_batch_sees_another_document(tokens: Tokens, size: int):
    blocks = packed(split_long(tokens, size), size, "separate", FILLER).blocks
    if not len(blocks["input_ids"]):
        return
    batch = batch_of(tuple(blocks), list(zip(*blocks.values(), strict=True)))
    starts = torch.tensor([0, *tokens.lengths.cumsum(0).tolist()])
    for ids, positions, counted in zip(batch["input_ids"], batch["position_ids"], batch["counted"], strict=True):
        begun = torch.cummax(torch.where(positions == 0, torch.arange(size), 0), 0).values  # as transformers reads it
        for place in counted.nonzero().flatten().tolist():
            first, token = int(ids[begun[place]]), int(ids[place])
            assert torch.searchsorted(starts, first, right=True) == torch.searchsorted(starts, token, right=True)
            assert token - first == int(positions[place]) == place - int(begun[place])
    assert bool((blocks["position_ids"] != FILLED).equal(batch["counted"]))
