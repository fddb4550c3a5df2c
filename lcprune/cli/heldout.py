"""The text that `evaluate` measures on, and in which precision: a recipe's own, a file, or the built-in text."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PretrainedConfig

from lcprune.cli.machines import OneDevice
from lcprune.data.module import TextDataModule
from lcprune.distillation.pair import Storage, storages
from lcprune.errors import InputError
from lcprune.merging.calibration import Batch

BLOCK = 512
"""Tokens in a block of a text that no recipe goes with, fewer where the model knows fewer positions."""


@dataclass(frozen=True)
class HeldOutText:
    """Batches, and how a run would look at them."""

    source: str
    """Where they come from, in words."""
    batches: Sequence[Batch]
    """`input_ids` [B, T] and what says which tokens are scored."""
    device: torch.device
    """Where to compute: as asked for, else as a run of the recipe does."""
    teacher: Storage | None = None
    """How a run of the recipe holds its teacher; None = there is no recipe."""
    cli: OneDevice | None = None
    """The recipe."""

    def precision(self) -> AbstractContextManager[object]:
        """What a student's pass runs in: the recipe's autocast, where it has one."""
        return nullcontext() if self.cli is None else self.cli.trainer.precision_plugin.forward_context()


def of_file(
    path: Path | None, tokenizer: str, config: PretrainedConfig, limit: int | None, device: str | None = None
) -> HeldOutText:
    """All of a file, or the held-out part of the built-in text.

    Args:
        path: As `data.path`; None = the built-in text.
        tokenizer: The model whose tokenizer is used.
        config: The model's.
        limit: At most so many blocks.
        device: Where to compute; default: cuda if there is one.
    """
    most = min(BLOCK, getattr(config.get_text_config(), "max_position_embeddings", None) or BLOCK)
    source = "held-out part of the built-in text" if path is None else path.name
    try:
        with _untold():
            text = _cut(path, tokenizer, most, limit)
    except InputError as error:
        raise InputError(f"--text {path or ''} cannot be cut into blocks of {most} tokens: {error}") from error
    batches = list(text.val_dataloader())
    count = sum(len(batch["input_ids"]) for batch in batches)
    rank_zero_info(f"{source}: {count} block{'s' * (count != 1)} of {text.block_size} tokens")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    return HeldOutText(source, batches, torch.device(device or usual))


def _cut(path: Path | None, tokenizer: str, most: int, limit: int | None) -> TextDataModule:
    """A text in blocks, all of a file; where it is shorter than one block, one as long as it is."""

    def in_blocks_of(size: int) -> TextDataModule:
        # The file as both parts: all of it is held out.
        return TextDataModule(
            tokenizer=tokenizer, path=path, validation_path=path, block_size=size, validation_blocks=limit
        )

    text = in_blocks_of(most)
    if path is not None and 1 < (length := len(text.read().validation.stream)) < most:
        text = in_blocks_of(length)
    text.setup()
    return text


@contextmanager
def _untold() -> Iterator[None]:
    """Keeps to itself how a text would be divided for training, of which there is none."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def of_recipe(path: Path, limit: int | None, device: str | None = None) -> HeldOutText:
    """The batches that a run's validation takes, seen as the run sees them.

    Args:
        path: The recipe; a run's own recipe.yaml, too.
        limit: At most so many blocks.
        device: Where to, instead of to what the recipe says.
    """
    cli = OneDevice(["--config", str(path)], device)
    trainer, module = cli.trainer, cli.model
    try:
        cli.datamodule.setup()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    loader, most = cli.datamodule.val_dataloader(), trainer.limit_val_batches
    count = int(len(loader) * most) if isinstance(most, float) else most
    batches = list(first_blocks(islice(loader, count), limit))
    if not batches:
        raise InputError(f"{path}: trainer.limit_val_batches={most} leaves no held-out text: name a text with --text.")
    teacher = storages(module.weights_dtype, module.teacher_dtype, module.lora, str(trainer.precision))[1]
    return HeldOutText(f"held-out part of {path.name}'s data", batches, trainer.strategy.root_device, teacher, cli)


def first_blocks(batches: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    """Batches with so many blocks in all, the last one cut."""
    for batch in batches:
        if limit is None:
            yield batch
            continue
        if limit <= 0:
            return
        yield {name: tensor[:limit] for name, tensor in batch.items()}
        limit -= len(batch["input_ids"])
