"""Documents in tokens, divided into those for training and those for validation."""

import pytest
import torch

from lcprune.data.tokens import Tokens, divided


def numbered(lengths: list[int]) -> Tokens:
    """Documents of these lengths; every token is its place."""
    total = sum(lengths)
    return Tokens(torch.arange(total).int(), torch.ones(total, dtype=torch.bool), torch.tensor(lengths))


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.999])
@pytest.mark.parametrize("lengths", [[5, 40], [30] * 10, [1, 2, 100, 3, 50, 4]], ids=str)
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
