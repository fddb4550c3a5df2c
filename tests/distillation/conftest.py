"""What every test of this room needs: a teacher in a folder, a text, a batch, one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import builders
from tests.distillation import runs


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors wait for a second thread longer than they compute; and bitwise equality needs equal threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of about 2,000 characters; read only."""
    return runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two blocks of 16 random tokens."""
    input_ids = builders.token_batches()[0]
    return {"input_ids": input_ids, "labels": input_ids.clone()}
