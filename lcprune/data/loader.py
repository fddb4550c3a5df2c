"""Which blocks are handed out when: shuffled, shared among ranks, and resumable in the middle of an epoch."""

import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lcprune.errors import InputError

Batch = dict[str, Tensor]
"""`input_ids` and `labels`, both int64 [B, T], and what `packing.training_batch_of` adds to them."""

Row = tuple[Tensor, ...]
"""A block: one tensor [T] for each of its names."""


class BlockSampler(DistributedSampler[int]):
    """Which blocks this rank sees, in which order: a pure function of seed and epoch.

    Every rank gets the same number of blocks and none is repeated: what does not divide evenly is left out. Being a
    DistributedSampler, Lightning leaves it in place and tells it the epoch.
    """

    start = 0
    """How many of this rank's blocks to skip; the length stays that of the whole epoch."""

    def __iter__(self) -> Iterator[int]:
        return iter(self.blocks()[self.start :])

    def blocks(self) -> list[int]:
        """All of this rank's blocks in this epoch, in order."""
        blocks = len(self.dataset)  # type: ignore[arg-type]
        order = list(range(blocks))
        if self.shuffle:
            order = torch.randperm(blocks, generator=generator(self.seed, self.epoch)).tolist()
        return order[self.rank : self.total_size : self.num_replicas]


class ResumableLoader(DataLoader[Row]):
    """A DataLoader over a `BlockSampler` whose position within the epoch Lightning saves and restores.

    Lightning knows the number of batches and therefore fetches none ahead, and what workers fetch ahead has not been
    handed out: so the batches handed out are the batches trained on.
    """

    _position = (0, 0)  # epoch, and how many of its batches have been handed out
    _resumed: tuple[int, int] | None = None  # a checkpoint's position, until the next iteration begins

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator on purpose: Lightning calls iter() before it tells the sampler the epoch, and workers would
        # begin to fetch at once.
        sampler = self._sampler
        epoch, start = self._resumed or (sampler.epoch, 0)
        if epoch != sampler.epoch:  # limit_train_batches ended that epoch early, and Lightning goes on to the next
            start = 0
        self._position, self._resumed = (sampler.epoch, start), None
        sampler.start = start * self._rows
        for handed_out, batch in enumerate(super().__iter__(), start + 1):
            self._position = (self._position[0], handed_out)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position, and what must be the same for it to mean the same; plain values, equal on every rank."""
        epoch, batch = self._resumed or self._position
        return {"epoch": epoch, "batch": batch, "workers": self.num_workers, **self._same}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues from a saved position at the next iteration.

        Raises:
            InputError: The position is in the middle of an epoch over other batches than these.
        """
        epoch, batch = state_dict["epoch"], state_dict["batch"]
        if batch == state_dict["batches"]:
            epoch, batch = epoch + 1, 0
        changes = [
            f"{name} was {state_dict[name]}, is {now}" for name, now in self._same.items() if now != state_dict[name]
        ]
        if batch and changes:
            raise InputError(
                f"the checkpoint stopped in the middle of an epoch over other batches ({', '.join(changes)}): resume "
                "with the same data settings, text and number of devices, or start a new run."
            )
        if changes:
            rank_zero_info(f"from this epoch on the batches are others than the checkpoint's: {', '.join(changes)}")
        if (before := state_dict.get("workers", self.num_workers)) != self.num_workers:
            rank_zero_info(f"data.num_workers was {before}, is {self.num_workers}: the batches stay the same")
        self._resumed = (epoch, batch)
        self._sampler.set_epoch(epoch)

    def blocks_of(self, batch: int) -> list[int]:
        """Which training blocks this rank gets in a batch of the epoch it is in."""
        first = batch * self._rows
        return self._sampler.blocks()[first : first + self._rows]

    @cached_property
    def _same(self) -> dict[str, int]:
        assert isinstance(self.dataset, TensorDataset)
        return {
            "batches": len(self),
            "batch_size": self._rows,
            "devices": self._sampler.num_replicas,
            "seed": self._sampler.seed,
            "text_crc32": crc32_of(self.dataset.tensors),
        }

    @property
    def _sampler(self) -> BlockSampler:
        assert isinstance(self.sampler, BlockSampler)
        return self.sampler

    @property
    def _rows(self) -> int:
        assert self.batch_size is not None
        return self.batch_size


def generator(seed: int, purpose: object) -> torch.Generator:
    """Random numbers for one purpose: a function of both alone."""
    # crc32, not seed + epoch: else seed 0 at epoch 1 would repeat seed 1 at epoch 0
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))


def crc32_of(tensors: Iterable[Tensor]) -> int:
    """A checksum of tensors' values."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.numpy().data, crc)
    return crc
