"""Documents that share a row do not see each other: what a model makes of them is what it makes of each alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging.calibration import Batch, Calibration, collect, hidden_states, last_tokens, logits
from lcprune.merging.gradients import Taylor
from lcprune.merging.packed import UNPACKABLE
from lcprune.merging.prefix import prefixes_of
from lcprune.merging.streams import Stream, one_by_one, regrouped
from tests.builders import ALL_FAMILIES, Family, tiny_config, tiny_llama, token_batches

PACKABLE = tuple(family for family in ALL_FAMILIES if tiny_config(model_type=family).model_type not in UNPACKABLE)
LENGTHS = (14, 9, 20)


def documents() -> list[Tensor]:
    """Three documents [1, T]."""
    return [token_batches(1, 1, length, seed=length)[0] for length in LENGTHS]


def packed(filled: int = 3) -> Batch:
    """The documents in two rows, in another order in the second, with some tokens filled up."""
    texts = documents()
    rows, positions = [], []
    for order in ((0, 1, 2), (2, 0, 1)):
        rows.append(torch.cat([*(texts[place] for place in order), torch.zeros(1, filled, dtype=torch.int64)], 1))
        ids = [torch.arange(LENGTHS[place]) for place in order]
        positions.append(torch.cat([*ids, torch.zeros(filled, dtype=torch.int64)])[None])
    input_ids, position_ids = torch.cat(rows), torch.cat(positions)
    counted = torch.ones_like(input_ids, dtype=torch.bool)
    counted[:, sum(LENGTHS) :] = False
    labels = input_ids.masked_fill(~counted | (position_ids == 0), -100)
    return {"input_ids": input_ids, "position_ids": position_ids, "counted": counted, "labels": labels}


def padded() -> Batch:
    """The documents in a row each."""
    rows = [torch.nn.functional.pad(text, (0, max(LENGTHS) - text.shape[1])) for text in documents()]
    mask = torch.stack([torch.arange(max(LENGTHS)) < length for length in LENGTHS])
    input_ids = torch.cat(rows)
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": input_ids.masked_fill(~mask, -100)}


@torch.no_grad()
def alone(model: PreTrainedModel) -> Tensor:
    """Logits of the documents, one behind the other, [1, sum of T, V]."""
    return torch.cat([model(input_ids=text, use_cache=False).logits for text in documents()], 1)


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, kind) for family in PACKABLE for kind in ("sdpa", "eager") if (family, kind) != ("gemma2", "sdpa")],
)
def test_packed_logits_are_those_of_each_document_alone(family: Family, attention: str):
    model = tiny_llama(4, model_type=family)
    model.config._attn_implementation = attention
    expected = alone(model)
    with torch.no_grad():
        found = logits(model, hidden_states(model, packed()))
    total, third = sum(LENGTHS), LENGTHS[2]
    torch.testing.assert_close(found[:1, :total], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1:, third:total], expected[:, :-third], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_padded_logits_are_those_of_each_document_alone(family: Family):
    model = tiny_llama(4, model_type=family)
    with torch.no_grad():
        found = logits(model, hidden_states(model, padded()))
    together = torch.cat([row[:length] for row, length in zip(found, LENGTHS, strict=True)])
    torch.testing.assert_close(together[None], alone(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", UNPACKABLE)
def test_family_that_would_mix_documents_is_refused(family: Family):
    with pytest.raises(InputError, match=f"data.packing=separate.*{family}.*pad, or to concatenate"):
        hidden_states(tiny_llama(2, model_type=family), packed())


def test_flash_attention_that_would_mix_the_documents_of_several_rows_is_refused():
    model = tiny_llama(2)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match=r"data\.batch_size is 2: set data\.batch_size to 1"):
        hidden_states(model, packed())


def test_rows_that_flash_attention_must_see_alone_are_not_put_together():
    model = tiny_llama(2)
    plain = [{"input_ids": batch["input_ids"]} for batch in one_by_one([packed()])]
    model.config._attn_implementation = "flash_attention_2"
    assert [len(batch["input_ids"]) for batch in regrouped(one_by_one([packed()]), model)] == [1, 1]
    assert [len(batch["input_ids"]) for batch in regrouped(plain, model)] == [2]


@pytest.mark.parametrize("walk", ["stream", "prefix", "whole"])
def test_every_way_through_the_layers_keeps_documents_apart(walk: str):
    model, batch = tiny_llama(4), packed()
    with torch.no_grad():
        expected = hidden_states(model, batch)
        if walk == "prefix":
            (found,) = prefixes_of(Calibration(model, [batch]), 3).run(2)
        else:
            batches = [batch] if walk == "whole" else regrouped(one_by_one([batch]), model)
            stream = Stream(model, batches)
            for layer in model.model.layers:
                stream.advance(layer)
            (found,) = stream.last_states()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("count", [collect, lambda model, batches: Taylor().score(Calibration(model, batches))])
def test_statistics_of_packed_documents_are_those_of_each_alone(count: Callable[..., object]):
    model = tiny_llama(4)
    apart = [{"input_ids": text, "labels": text} for text in documents()]
    first = {name: tensor[:1] for name, tensor in packed().items()}
    one, other = count(model, [first]), count(model, apart)
    if isinstance(one, tuple):
        assert one == pytest.approx(other, rel=1e-4)
    else:
        assert one.tokens == other.tokens == sum(LENGTHS)
        assert one.cosine[1] == pytest.approx(other.cosine[1], rel=1e-4)


def test_last_tokens_of_packed_documents_are_the_last_of_each():
    (batch,) = last_tokens([packed()])
    assert batch["counted"].nonzero().tolist() == [[0, 13], [0, 22], [0, 42], [1, 19], [1, 33], [1, 42]]
