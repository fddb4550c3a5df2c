"""Fixtures for all tests: offline, quiet, one thread; the builders of `tests.builders` by name."""

import os

# Before any Hugging Face import: these are read once.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1", DO_NOT_TRACK="1")
os.environ.update(TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests import builders

# The same examples at every run: what is found at random is looked for by the slow tests.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

THREADS = torch.get_num_threads()


def _take(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start


# Tiny models gain nothing from a second thread, and where another process runs, pytest -n 2 too, threads wait for each
# other busily: 5 to 20 times as long.
_take(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Only the demo model is large enough for all threads."""
    _take(THREADS if item.get_closest_marker("model") else 1)


@pytest.fixture
def tiny_llama() -> Callable[..., PreTrainedModel]:
    """The builder: `tiny_llama(n_layers=6, tied=True, dtype=..., seed=0, model_type="llama")`."""
    return builders.tiny_llama


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer; read only."""
    return builders.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A six-layer Llama and its tokenizer as a Hugging Face folder; read only."""
    return builders.save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def token_batches() -> list[Tensor]:
    """Three batches of token ids, (2, 16)."""
    return builders.token_batches()
