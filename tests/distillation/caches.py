"""Caches of tiny teachers, as `lcprune cache` makes them. Shared by the tests of the cache and of runs with one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lcprune.distillation.cache import Origin
from lcprune.distillation.fill import Filling, different, origin_of
from lcprune.distillation.teacher import Teacher, load
from tests import builders

HIDDEN = 32
FEW = 9
"""Blocks of 16 tokens in `blocks`, two of which are alike."""


def blocks() -> Tensor:
    """Blocks [10, 16] of random tokens; the last repeats the first."""
    rows = torch.cat(builders.token_batches(3, 3)).int()
    return torch.cat([rows, rows[:1]])


def origin(
    teacher: Path, rows: Tensor, *, top_k: int = 5, layers: Sequence[int] = (), dtype: str = "float32"
) -> Origin:
    """Of a cache of these blocks, two at once."""
    return origin_of(str(teacher), rows, dtype=dtype, batch_size=2, top_k=top_k, layers=tuple(layers))


def filling(folder: Path, teacher: Path, rows: Tensor, **settings: object) -> Filling:
    """A cache with two blocks in a shard; `settings` as for `origin`."""
    return Filling(folder, origin(teacher, different(rows), **settings), HIDDEN, 1)  # type: ignore[arg-type]


def fill(
    folder: Path, teacher: Path, rows: Tensor, *, model: PreTrainedModel | None = None, **settings: object
) -> Path:
    """A finished cache of these blocks; `settings` as for `origin`."""
    job = filling(folder, teacher, rows, **settings)
    dtype = job.origin.dtype
    job.run(Teacher(load(str(teacher), dtype) if model is None else model), different(rows))  # type: ignore[arg-type]
    return folder
