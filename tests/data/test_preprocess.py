"""Nothing is lost or doubled between a document and a block."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lcprune.data.preprocess import pack, tokenize
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
