"""Tokens per second, several models in turn in one process, so that their ratio holds where a machine's speed drifts.

    prefill    one pass over a batch, with logits
    decode     one text, token by token behind a short prompt, with a cache

Each figure is the median of `REPEATS` passes; the pass before them warms up.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lcprune.delivery.decoding import steps
from lcprune.merging.calibration import evaluating
from lcprune.merging.progress import track

REPEATS = 3
"""Timed passes of each model; the median counts."""
DECODED = 32
"""Tokens written in a timed pass."""


def prefill(models: Mapping[str, PreTrainedModel], ids_BT: Tensor) -> dict[str, float]:
    """Tokens per second of a forward pass with logits, by the models' names.

    Args:
        models: On one device.
        ids_BT: Tokens to run; B * T of them count.
    """

    def once(model: PreTrainedModel) -> float:
        start = _now(model.device)
        model(input_ids=ids_BT.to(model.device), use_cache=False)
        return _now(model.device) - start

    return _rates(models, once, ids_BT.numel(), "timing passes over a text")


def decode(models: Mapping[str, PreTrainedModel], prompt_T: Tensor, tokens: int = DECODED) -> dict[str, float]:
    """Tokens per second while one text is written, by the models' names; reading the prompt is not timed.

    Args:
        models: On one device.
        prompt_T: What the text begins with.
        tokens: How many are written.
    """

    def once(model: PreTrainedModel) -> float:
        ahead = steps(model, prompt_T[None].to(model.device))
        next(ahead)
        start = _now(model.device)
        for _ in islice(ahead, tokens):
            pass
        return _now(model.device) - start

    return _rates(models, once, tokens, "timing texts token by token")


def peak_bytes(model: PreTrainedModel, ids_BT: Tensor) -> int | None:
    """Most memory on the GPU during a forward pass with logits, weights included; None on a CPU.

    What else lies on the GPU, another model say, is not counted.
    """
    if model.device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    with evaluating(model):
        model(input_ids=ids_BT.to(model.device), use_cache=False)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return torch.cuda.max_memory_allocated(model.device) - before + weights


def _rates(
    models: Mapping[str, PreTrainedModel], once: Callable[[PreTrainedModel], float], tokens: int, what: str
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(REPEATS + 1), what):
        for name, model in models.items():
            with evaluating(model):
                seconds[name].append(once(model))
    return {name: tokens / statistics.median(times[1:]) for name, times in seconds.items()}


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
