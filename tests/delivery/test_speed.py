"""Speeds are taken in turn, so that a machine whose speed drifts treats all models alike; no time is asserted."""

import pytest
import torch

from lcprune.delivery import speed
from tests.builders import tiny_llama, token_batches


@pytest.mark.parametrize("way", ["prefill", "decode"])
def test_models_are_timed_in_turn(way: str):
    models, order = {"teacher": tiny_llama(3), "student": tiny_llama(2)}, []
    for name, model in models.items():
        model.register_forward_hook(lambda module, args, output, name=name: order.append(name))
    ids = token_batches()[0]
    rates = speed.prefill(models, ids) if way == "prefill" else speed.decode(models, ids[0], 5)
    passes = 1 if way == "prefill" else 1 + 5
    assert order == (["teacher"] * passes + ["student"] * passes) * (1 + speed.REPEATS)
    assert rates.keys() == models.keys()
    assert min(rates.values()) > 0


def test_speed_is_tokens_over_the_median_of_the_passes_behind_the_first(monkeypatch: pytest.MonkeyPatch):
    times = iter([0.0, 100.0, 0.0, 1.0, 0.0, 2.0, 0.0, 50.0])
    monkeypatch.setattr(speed, "_now", lambda device: next(times))
    assert speed.prefill({"model": tiny_llama(1)}, token_batches()[0]) == {"model": 2 * 16 / 2.0}


def test_peak_memory_is_not_known_on_a_cpu():
    assert speed.peak_bytes(tiny_llama(1), torch.zeros(1, 2, dtype=torch.int64)) is None
