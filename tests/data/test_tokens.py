"""Documents in tokens, divided into those for training and those for validation."""

import pytest
import torch

from lcprune.data.chat import Piece
from lcprune.data.preprocess import AT_ONCE
from lcprune.data.tokens import Tokens, divided, encoded
from tests import builders


def numbered(lengths: list[int]) -> Tokens:
    """Documents of these lengths; every token is its place."""
    total = sum(lengths)
    return Tokens(torch.arange(total).int(), torch.ones(total, dtype=torch.bool), torch.tensor(lengths))


def test_documents_that_are_more_than_the_tokenizer_is_given_at_once_come_in_order_and_once_each():
    tokenizer = builders.tiny_tokenizer()
    documents: list[list[Piece]] = [[(f"q{number}", False), (f"a{number}", True)] for number in range(2 * AT_ONCE + 1)]
    found = [tokenizer.decode(ids) for ids, _ in encoded(documents, tokenizer)]
    assert found == ["".join(text for text, _ in document) for document in documents]


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.999])
@pytest.mark.parametrize("lengths", [[5, 6, 5], [30] * 10, [1, 2, 100, 3, 50, 4]], ids=str)
def test_divided_partitions_whole_documents_in_order_with_one_on_each_side(lengths: list[int], fraction: float):
    whole = numbered(lengths)
    training, validation = divided(whole, fraction=fraction, block_size=8, seed=0)
    documents = whole.stream.split(lengths)
    for part in (training, validation):
        inside = [document for document in documents if document[0] in part.stream]
        assert inside
        assert [ids.tolist() for ids, _ in part.documents()] == [document.tolist() for document in inside]
    assert torch.cat([training.stream, validation.stream]).sort().values.equal(whole.stream)


def test_divided_holds_out_the_fraction_and_at_least_a_block():
    whole = numbered([10] * 100)
    for fraction, held_out in ((0.2, 200), (0.01, 70)):
        assert len(divided(whole, fraction=fraction, block_size=64, seed=0)[1].stream) == held_out


@pytest.mark.parametrize("lengths", [[10_000, *[5] * 60], [5, 10_000], [3000] * 4, [900, 5, 4000]], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_divided_holds_out_about_what_was_asked_for_however_uneven_documents_are(lengths: list[int], seed: int):
    whole = numbered(lengths)
    training, validation = divided(whole, fraction=0.05, block_size=8, seed=seed)
    assert 0.049 <= len(validation.stream) / sum(lengths) <= 0.11
    assert torch.cat([training.stream, validation.stream]).sort().values.equal(whole.stream)


def test_division_of_documents_that_are_not_uneven_is_the_one_that_earlier_runs_had():
    lengths = [40 + 37 * number % 900 for number in range(100)]
    _, validation = divided(numbered(lengths), fraction=0.05, block_size=64, seed=0)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    assert [starts.index(int(ids[0])) for ids, _ in validation.documents()] == [19, 44, 90, 93]


def test_conversations_are_never_cut():
    whole = numbered([3000] * 4)
    assert divided(whole, fraction=0.05, block_size=8, seed=0, cut=False)[1].lengths.tolist() == [3000]


def test_divided_is_a_function_of_the_seed():
    whole = numbered([10] * 100)
    one, same, other = (divided(whole, fraction=0.1, block_size=8, seed=seed)[1].stream for seed in (1, 1, 2))
    assert one.equal(same)
    assert not one.equal(other)


@pytest.mark.parametrize(
    ("length", "fraction", "tail"),
    [(100, 0.2, 20), (100, 0.01, 8), (16, 0.01, 8), (15, 0.5, 7), (100, 0.99, 92), (5, 0.5, 0)],
)
def test_divided_cuts_a_single_document_and_leaves_each_side_a_block_where_there_are_two(
    length: int, fraction: float, tail: int
):
    whole = numbered([length])
    training, validation = divided(whole, fraction=fraction, block_size=8, seed=0)
    assert torch.cat([training.stream, validation.stream]).equal(whole.stream)
    assert len(validation.stream) == tail
