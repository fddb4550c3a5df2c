"""Nothing is lost or doubled between a document and a block."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lcprune.data.preprocess import pack, split, tokenize
from lcprune.errors import InputError


def test_tokenize_decodes_back_to_the_documents(tiny_tokenizer: PreTrainedTokenizerFast):
    documents = ["first one", "b", "the third"] * 700  # more than the tokenizer is given at once
    stream, lengths = tokenize(documents, tiny_tokenizer)
    assert stream.dtype == torch.int32
    decoded = [tiny_tokenizer.decode(part.tolist()) for part in stream.split(lengths.tolist())]
    assert decoded == [f"{document}<eos>" for document in documents]


def test_tokenize_does_not_double_an_eos_of_the_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast):
    with_eos, without = tokenize(["a<eos>", "b"], tiny_tokenizer), tokenize(["a", "b"], tiny_tokenizer)
    assert all(one.equal(other) for one, other in zip(with_eos, without, strict=True))


def test_tokenize_refuses_a_tokenizer_without_eos(tiny_tokenizer: PreTrainedTokenizerFast):
    without = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no end-of-text token"):
        tokenize(["a"], without)


@pytest.mark.parametrize("length", [0, 3, 4, 11, 12])
def test_pack_keeps_every_token_but_a_remainder_shorter_than_a_block(length: int):
    stream = torch.arange(length)
    blocks, left = pack(stream, 4)
    assert blocks.shape == (length // 4, 4)
    assert left == length % 4
    assert blocks.flatten().equal(stream[: length - left])


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.999])
@pytest.mark.parametrize("lengths", [[5, 40], [30] * 10, [1, 2, 100, 3, 50, 4]], ids=str)
def test_split_partitions_whole_documents_in_order_with_one_on_each_side(lengths: list[int], fraction: float):
    stream = torch.arange(sum(lengths))
    documents = stream.split(lengths)
    training, validation = split(stream, torch.tensor(lengths), fraction=fraction, block_size=8, seed=0)
    for part in (training, validation):
        inside = [document for document in documents if document[0] in part]
        assert inside
        assert part.equal(torch.cat(inside))
    assert torch.cat([training, validation]).sort().values.equal(stream)


def test_split_holds_out_the_fraction_and_at_least_a_block():
    stream, lengths = torch.arange(1000), torch.full((100,), 10)
    for fraction, held_out in ((0.2, 200), (0.01, 70)):
        assert len(split(stream, lengths, fraction=fraction, block_size=64, seed=0)[1]) == held_out


def test_split_is_a_function_of_the_seed():
    stream, lengths = torch.arange(1000), torch.full((100,), 10)
    one, same, other = (split(stream, lengths, fraction=0.1, block_size=8, seed=seed)[1] for seed in (1, 1, 2))
    assert one.equal(same)
    assert not one.equal(other)


@pytest.mark.parametrize(
    ("length", "fraction", "tail"),
    [(100, 0.2, 20), (100, 0.01, 8), (16, 0.01, 8), (15, 0.5, 7), (100, 0.99, 92), (5, 0.5, 0)],
)
def test_split_cuts_a_single_document_and_leaves_each_side_a_block_where_there_are_two(
    length: int, fraction: float, tail: int
):
    stream = torch.arange(length)
    training, validation = split(stream, torch.tensor([length]), fraction=fraction, block_size=8, seed=0)
    assert torch.cat([training, validation]).equal(stream)
    assert len(validation) == tail
