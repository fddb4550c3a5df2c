"""What a model writes greedily is its own argmax, with or without a cache; repetition is counted as defined."""

import pytest
import torch

from lcprune.delivery.decoding import cache_bytes_per_token, continuations, repetition
from lcprune.merging.calibration import evaluating
from tests.builders import ALL_FAMILIES, Family, tiny_llama, token_batches


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_continuations_are_the_argmax_of_passes_without_a_cache(model_type: Family):
    model = tiny_llama(3, model_type=model_type)
    ids = token_batches(length=5)[0]
    model.generation_config.eos_token_id = None
    expected = ids
    with evaluating(model):
        for _ in range(12):  # past the sliding windows of 8
            expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], dim=1)
    assert continuations(model, ids, 12) == expected[:, 5:].tolist()


def test_continuations_end_before_the_first_end_of_text():
    model = tiny_llama(2)
    ids = token_batches(length=5)[0]
    model.generation_config.eos_token_id = None
    whole = continuations(model, ids, 12)
    end = whole[0][4]
    model.generation_config.eos_token_id = [end]
    assert continuations(model, ids, 12)[0] == whole[0][: whole[0].index(end)]


def test_continuations_ignore_a_repetition_penalty():
    model = tiny_llama(2)
    ids = token_batches(length=5)[0]
    plain = continuations(model, ids, 12)
    model.generation_config.repetition_penalty = 5.0
    assert continuations(model, ids, 12) == plain


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([[1, 2, 3, 4, 5]], 0.0),
        ([[7] * 7], 0.75),  # one of four 4-grams is new
        ([[1, 2, 1, 2, 1, 2, 1]], 0.5),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 0.0),  # the same in two texts is no repetition
        ([[7] * 7, [1, 2, 3, 4, 5]], 0.5),  # texts count by their length: 3 of 6
        ([[7] * 7, [1, 2, 3]], 0.75),
        ([[1, 2, 3]], None),
        ([], None),
    ],
)
def test_repetition_is_the_share_of_four_grams_seen_before(texts: list[list[int]], expected: float | None):
    assert repetition(texts) == expected


@pytest.mark.parametrize(
    ("model_type", "heads"), [("llama", 2), ("mistral", 2), ("gpt2", 4), ("bloom", 4), ("falcon-7b", 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_keys_and_values(model_type: Family, heads: int, dtype: torch.dtype):
    model = tiny_llama(3, model_type=model_type, dtype=dtype)
    assert cache_bytes_per_token(model) == 3 * 2 * heads * 8 * dtype.itemsize
