"""The data of a run: a HF data set, a file, the teacher's own or the built-in text, packed into blocks and batched.

    documents -> split -> tokens -> blocks [N, T] -> training loader | validation loader | calibration batches

A batch is `{"input_ids": [B, T], "labels": [B, T]}`, int64, with HF's convention: the labels equal the inputs and the
model shifts them. Blocks are full, so there is no attention mask.

The training order is a pure function of seed and epoch, and the loader's position is part of the checkpoint, so a run
that was killed in the middle of an epoch sees exactly the batches that were left. Every rank tokenises for itself and
arrives at the same blocks.
"""

import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler, SequentialSampler, TensorDataset

from lcprune.data.generate import COLUMN, Generate, text_file
from lcprune.data.preprocess import pack, split, tokenize
from lcprune.data.sources import file_mistake, read_file, read_hub
from lcprune.demo import DEMO, load_tokenizer
from lcprune.errors import InputError

Batch = dict[str, Tensor]
"""`input_ids` and `labels`, both int64 [B, T]."""

FRACTION = 0.05
"""Of the text, held out unless the user says otherwise."""

_Rows = tuple[Tensor, ...]


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
            order = torch.randperm(blocks, generator=_generator(self.seed, self.epoch)).tolist()
        return order[self.rank : self.total_size : self.num_replicas]


class ResumableLoader(DataLoader[_Rows]):
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
            "text_crc32": zlib.crc32(self.dataset.tensors[0].numpy().data),
        }

    @property
    def _sampler(self) -> BlockSampler:
        assert isinstance(self.sampler, BlockSampler)
        return self.sampler

    @property
    def _rows(self) -> int:
        assert self.batch_size is not None
        return self.batch_size


class TextDataModule(L.LightningDataModule):
    """Text from a local file, a HF data set, the teacher or Python's own language reference, packed into blocks.

    Args:
        tokenizer: Model whose tokenizer is used: a local folder, a hub name or demo:smollm2.
        path: A local .jsonl, .json, .csv, .parquet or .txt file (one document a row; a .txt file is one document).
            Without path, dataset and generate, the text is the language reference inside Python (pydoc_data.topics).
        validation_path: A file of the same kinds with the validation text; without it a part of the text is held out.
        dataset: Name of a data set on the Hugging Face hub.
        dataset_config: The data set's configuration, where it has several.
        split: The data set's split; slices such as train[:1%] work.
        generate: Lets the teacher write the text, once; it is kept in the user's cache folder.
        text_column: The column that holds the text, in data.generate.prompts too.
        block_size: Tokens in a block; memory and time of a training step grow with it.
        batch_size: Blocks in a batch, on each device.
        validation_fraction: Fraction of the tokens held out for validation, as whole documents and at least one block;
            of a single document the tail.
        validation_blocks: At most so many blocks are validated on; all of them if null.
        calibration_blocks: At most so many training blocks, drawn at random, are shown to criteria and refits.
        num_workers: Processes that make batches; 0 is fastest here, the blocks are in memory.
        seed: Decides the validation part, the training order and the calibration blocks.

    Raises:
        InputError: With every mistake in the arguments, before anything is loaded.
    """

    def __init__(
        self,
        *,
        tokenizer: str = DEMO,
        path: Path | None = None,
        validation_path: Path | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        split: str = "train",
        generate: Generate | None = None,
        text_column: str = "text",
        block_size: int = 512,
        batch_size: int = 4,
        validation_fraction: float = FRACTION,
        validation_blocks: int | None = None,
        calibration_blocks: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.path = None if path is None else Path(path).expanduser()
        self.validation_path = None if validation_path is None else Path(validation_path).expanduser()
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.split = split
        self.generate = generate
        self.text_column = text_column
        self.block_size = block_size
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.validation_blocks = validation_blocks
        self.calibration_blocks = calibration_blocks
        self.num_workers = num_workers
        self.seed = seed
        self._blocks: dict[str, Tensor] = {}  # "training" and "validation", each int32 [N, T], once set up
        if mistakes := [*self._source_mistakes(), *self._number_mistakes()]:
            raise InputError("; ".join(mistakes) + ".")

    def prepare_data(self) -> None:
        """Fetches what comes from the hub, unpacks the demo model, lets the teacher write; once per machine."""
        load_tokenizer(self.tokenizer)
        if self.dataset is not None:
            self._documents()
        if self.generate is not None:
            text_file(self.generate, teacher=self.tokenizer, column=self.text_column)

    def setup(self, stage: str | None = None) -> None:
        """Reads, tokenises and packs; the second call does nothing, and every stage gets the same.

        Raises:
            InputError: The text cannot be read, or is shorter than one block.
        """
        if not self._blocks:
            training, validation = self._streams()
            self._blocks = {
                "training": self._pack("training", training),
                "validation": self._pack("validation", validation)[: self.validation_blocks],
            }
        if stage == "fit" and self.trainer is not None:  # before weights are loaded
            self._check_training_blocks()

    def train_dataloader(self) -> DataLoader[_Rows]:
        """Full batches in an order of their own every epoch, as many on every rank; resumable within the epoch."""
        self._check_training_blocks()
        return self._loader(ResumableLoader, self._blocks["training"])

    def _check_training_blocks(self) -> None:
        blocks, devices = self._blocks["training"], self._world[0]
        if len(blocks) < self.batch_size * devices:
            raise InputError(
                f"data.batch_size={self.batch_size} on {devices} device(s) needs {self.batch_size * devices} training "
                f"blocks, but the text gives {len(blocks)} of {self.block_size} tokens: lower data.batch_size or "
                "data.block_size, or give more text."
            )

    def val_dataloader(self) -> DataLoader[_Rows]:
        """The held-out blocks in order, none twice; several ranks share them evenly and leave a remainder out."""
        blocks, devices = self._blocks["validation"], self._world[0]
        if len(blocks) < devices:
            raise InputError(
                f"validation on {devices} devices needs as many blocks, but the text gives {len(blocks)}: raise "
                "data.validation_fraction or data.validation_blocks, lower data.block_size, or use fewer devices."
            )
        return self._loader(DataLoader, blocks)

    def test_dataloader(self) -> DataLoader[_Rows]:
        """The held-out blocks, as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[_Rows]:
        """The held-out blocks, as for validation."""
        return self.val_dataloader()

    def training_blocks(self) -> Tensor:
        """Every training block [N, T] in the text's order, int32; works without a trainer and before `setup`."""
        self.setup()
        return self._blocks["training"]

    def calibration_batches(self) -> list[Batch]:
        """At most `calibration_blocks` training blocks, drawn by the seed, in the text's order; the same on every rank.

        Works without a trainer and before `setup`.
        """
        self.setup()
        blocks = self._blocks["training"]
        chosen = torch.randperm(len(blocks), generator=_generator(self.seed, "calibration"))[: self.calibration_blocks]
        return [_batch([(row,) for row in rows]) for rows in blocks[chosen.sort().values].split(self.batch_size)]

    @property
    def _world(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(self, kind: type[DataLoader[_Rows]], blocks: Tensor) -> DataLoader[_Rows]:
        training = kind is ResumableLoader
        rows = TensorDataset(blocks)
        sampler: Sampler[int] = BlockSampler(rows, *self._world, shuffle=training, seed=self.seed, drop_last=True)
        if self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            kind, sampler = DataLoader, SequentialSampler(rows)  # all that Lightning accepts for overfit_batches
        return kind(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=training,
            num_workers=self.num_workers,
            collate_fn=_batch,
            generator=torch.Generator(),  # else every epoch would draw a number from the global one
        )

    def _streams(self) -> tuple[Tensor, Tensor]:
        tokenizer = load_tokenizer(self.tokenizer)
        stream, lengths = tokenize(self._documents(), tokenizer)
        if self.validation_path is not None:
            held_out = read_file("data.validation_path", self.validation_path, self.text_column)
            return stream, tokenize(held_out, tokenizer)[0]
        return split(stream, lengths, fraction=self.validation_fraction, block_size=self.block_size, seed=self.seed)

    def _documents(self) -> Sequence[str]:
        if self.path is not None:
            return read_file("data.path", self.path, self.text_column)
        if self.dataset is not None:
            return read_hub(self.dataset, self.dataset_config, self.split, self.text_column)
        if self.generate is not None:
            path = text_file(self.generate, teacher=self.tokenizer, column=self.text_column)
            rank_zero_info(f"text written by {self.generate.model or self.tokenizer}: {path}")
            return read_file("data.generate", path, COLUMN)
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]

    def _pack(self, part: str, stream: Tensor) -> Tensor:
        blocks, left = pack(stream, self.block_size)
        if len(blocks) == 0:
            more = ", raise data.validation_fraction, name a data.validation_path" if part == "validation" else ""
            raise InputError(
                f"the {part} part of the text has {len(stream)} tokens, less than one block of "
                f"data.block_size={self.block_size}: lower data.block_size{more} or give more text."
            )
        rank_zero_info(f"{part}: {len(blocks)} blocks of {self.block_size} tokens, {left} tokens left over")
        return blocks

    def _source_mistakes(self) -> Iterator[str]:
        if not self.tokenizer:
            yield "data.tokenizer is empty: name a local folder, a hub model or demo:smollm2"
        sources = {
            f"data.path={self.path}": self.path,
            f"data.dataset={self.dataset!r}": self.dataset,
            "data.generate": self.generate,
        }
        if len(given := [name for name, value in sources.items() if value is not None]) > 1:
            yield f"{' and '.join(given)} are {'both' if len(given) == 2 else 'all'} set: keep one of them"
        if self.dataset is None and (self.dataset_config is not None or self.split != "train"):
            yield "data.dataset_config and data.split belong to data.dataset, which is not set: set it or drop them"
        if self.validation_path is not None and self.validation_fraction != FRACTION:
            yield f"data.validation_fraction={self.validation_fraction} does nothing beside validation_path: drop it"
        files_with_columns = [path for path in (self.path, self.validation_path) if path and path.suffix != ".txt"]
        columns = self.dataset is not None or self.generate is not None or files_with_columns
        if self.text_column != COLUMN and not columns:
            yield f"data.text_column={self.text_column!r} does nothing for text without columns: drop it"
        files = {
            "data.path": self.path,
            "data.validation_path": self.validation_path,
            "data.generate.prompts": None if self.generate is None else self.generate.prompts,
        }
        for field, path in files.items():
            if path is not None and (mistake := file_mistake(path)):
                yield f"{field}={path} {mistake}"

    def _number_mistakes(self) -> Iterator[str]:
        least = {"block_size": 2, "batch_size": 1, "calibration_blocks": 1, "num_workers": 0}
        for field, minimum in least.items():
            if getattr(self, field) < minimum:
                yield f"data.{field}={getattr(self, field)} must be {minimum} or more"
        if self.validation_blocks is not None and self.validation_blocks < 1:
            yield f"data.validation_blocks={self.validation_blocks} must be 1 or more, or null for all"
        if not 0 < self.validation_fraction < 1:
            yield f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1, both excluded"


def _generator(seed: int, purpose: object) -> torch.Generator:
    # crc32, not seed + epoch: else seed 0 at epoch 1 would repeat seed 1 at epoch 0
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))


def _batch(rows: Sequence[_Rows]) -> Batch:
    input_ids = torch.stack([row for (row,) in rows]).long()
    return {"input_ids": input_ids, "labels": input_ids.clone()}
