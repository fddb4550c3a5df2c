"""What a model writes greedily, how often it repeats itself, and what its cache costs.

    rep-n = 1 - unique n-grams / n-grams          summed over texts, each looked at by itself

rep-4 is the usual one (Welleck et al., arXiv:1908.04319, call it seq-rep-4): near 0 for human prose, near 1 for a loop.
Decoding is plain argmax, whatever the model's generation_config says: a repetition penalty would hide what is asked.
Legend: `B` texts, `T` tokens of the prompt, `N` new tokens.
"""

import inspect
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from lcprune.merging.calibration import evaluating
from lcprune.merging.progress import track

NGRAM = 4
"""Tokens that have to recur to count as a repetition."""
MEASURED = 4
"""Tokens whose cache is measured: fewer than any sliding window holds."""


def steps(model: PreTrainedModel, prompt_BT: Tensor) -> Iterator[Tensor]:
    """The likeliest next tokens [B, 1], without end: the prompt in one pass, then a pass for every token.

    Args:
        model: In eval mode, without gradients.
        prompt_BT: Tokens without padding, on the model's device.
    """
    given, cache = prompt_BT, DynamicCache(config=model.config)
    named = {_cache_argument(model): cache}
    while True:
        given = model(input_ids=given, use_cache=True, **named).logits[:, -1:].argmax(-1)
        yield given


def continuations(model: PreTrainedModel, prompt_BT: Tensor, number: int, what: str = "text") -> list[list[int]]:
    """How a model goes on after every prompt, greedily, up to its end-of-text token.

    Args:
        model: A causal LM, not changed.
        prompt_BT: Tokens without padding.
        number: N, new tokens at most.
        what: Whose, for the progress bar.

    Returns:
        Per prompt at most N tokens, without the one that ends the text.
    """
    with evaluating(model):
        ahead = islice(steps(model, prompt_BT.to(model.device)), number)
        new_BN = torch.cat(list(track(ahead, f"writing {what}", number)), dim=1)
    ends = _ends(model)
    return [_until(row, ends) for row in new_BN.tolist()]


def all_continuations(
    model: PreTrainedModel, prompts: Sequence[Tensor], number: int, what: str = "text"
) -> list[list[int]]:
    """`continuations` of prompts [T] of any lengths, in their order; those of one length are written together.

    No text goes beyond the positions that the model knows.
    """
    written: dict[int, list[int]] = {}
    for length in sorted(set(map(len, prompts))):
        places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
        together = torch.stack([prompts[place] for place in places])
        texts = continuations(model, together, room(model, length, number), what)
        written.update(zip(places, texts, strict=True))
    return [written[place] for place in range(len(prompts))]


def room(model: PreTrainedModel, given: int, number: int) -> int:
    """How many tokens, up to a number and at least one, a model may write behind so many."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return number if positions is None else max(1, min(number, positions - given))


def repetition(texts: Sequence[Sequence[int]], n: int = NGRAM) -> float | None:
    """rep-n of some texts, 0 to 1; None where none of them has n tokens.

    Example:
        >>> repetition([[1, 2, 1, 2, 1, 2, 1]])  # 1212 2121 1212 2121
        0.5
    """
    grams = [[tuple(text[at : at + n]) for at in range(len(text) - n + 1)] for text in texts]
    total = sum(map(len, grams))
    return 1 - sum(len(set(some)) for some in grams) / total if total else None


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values that one more token costs while a model writes, measured on the cache itself."""
    ids_BT = torch.zeros((1, MEASURED), dtype=torch.int64, device=model.device)
    cache = DynamicCache(config=model.config)
    with evaluating(model):
        model(input_ids=ids_BT, use_cache=True, **{_cache_argument(model): cache})
    layers = (layer for layer in cache.layers if isinstance(layer, CacheLayerMixin))
    tensors = (tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None)
    return sum(tensor.nbytes for tensor in tensors) // MEASURED


def _cache_argument(model: PreTrainedModel) -> str:
    """What the model calls its cache: transformers renamed it family by family in the course of version 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _ends(model: PreTrainedModel) -> set[int]:
    """The tokens that end a text."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set(configured if isinstance(configured, list) else () if configured is None else (configured,))


def _until(row: Sequence[int], ends: set[int]) -> list[int]:
    return list(row[: next((place for place, token in enumerate(row) if token in ends), len(row))])
