"""The data of a run: HF data sets, files, the teacher's own or the built-in text, packed into blocks and batched.

    documents -> tokens -> training | validation -> blocks [N, T] -> training loader | validation loader | calibration

A batch is `{"input_ids": [B, T], "labels": [B, T]}`, int64, with HF's convention: the labels equal the inputs, or are
-100 where nothing is learned, and the model shifts them. Where documents are kept apart (packing.py) there are
`position_ids` or an `attention_mask` beside them.

The training order is a pure function of seed and epoch, and the loader's position is part of the checkpoint, so a run
that was killed in the middle of an epoch sees exactly the batches that were left. Every rank tokenises for itself and
arrives at the same blocks.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler, TensorDataset

from lcprune.data.chat import Learn
from lcprune.data.columns import TEXT, Columns, Documents
from lcprune.data.corpus import Corpus, Reading, corpus_of, filler_of
from lcprune.data.generate import Generate
from lcprune.data.loader import Batch, BlockSampler, ResumableLoader, Row, crc32_of, generator
from lcprune.data.mixture import Part
from lcprune.data.origin import Origin
from lcprune.data.packing import Blocks, Packed, Packing, batch_of, packed, training_batch_of
from lcprune.data.paths import Given, files_of
from lcprune.data.streaming import Share, StreamLoader
from lcprune.demo import DEMO
from lcprune.errors import InputError
from lcprune.files import path_of
from lcprune.models import load_tokenizer, name_of

FRACTION = 0.05
"""Of the text, held out unless the user says otherwise."""
WINDOW = 10_000
"""Rows of a stream in memory at a time, unless the user says otherwise."""


@runtime_checkable
class Taught(Protocol):
    """A Lightning module that is taught by a model."""

    teacher_name: str
    """The model's."""


class TextDataModule(L.LightningDataModule):
    """Text or chat from a local file, a HF data set, the teacher or Python's own language reference, in blocks.

    Args:
        tokenizer: Model whose tokenizer is used: a local folder, a hub name or demo:smollm2. Default: the teacher of
            what the trainer trains; where there is none yet, demo:smollm2.
        path: A local .jsonl, .json, .csv, .parquet or .txt file (one document a row; a .txt file is one document), or
            several of one kind: a list, a folder, or a pattern such as texts/*.jsonl; .gz and .zst may stand behind.
            Without path, dataset and generate, the text is the language reference inside Python (pydoc_data.topics).
        validation_path: The validation text, in a file of the same kinds; without it a part of the text is held out.
        dataset: Name of a data set on the Hugging Face hub.
        dataset_config: The data set's configuration, where it has several.
        split: The data set's split; slices such as train[:1%] work.
        generate: Lets the teacher write the text, once; it is kept in the user's cache folder.
        mixture: Several sets instead of one, each a path or a dataset with a weight, its share of the tokens.
        streaming: Reads path or dataset piece by piece, over and over, for sets larger than the memory; needs
            trainer.max_steps. Validation and calibration text come from the first window.
        streaming_window: Number of rows that are in memory and shuffled at a time.
        text_column: The column that holds the text, in data.generate.prompts too.
        messages_column: The column that holds conversations, lists of {role, content}; without it columns are found
            by their usual names (messages; prompt and response), unless there is one of text.
        prompt_column: The column that holds the prompts; needs response_column.
        response_column: The column that holds the responses; needs prompt_column.
        chat_template: A Jinja file that says how to write conversations, instead of the tokenizer's own template.
        learn: What of a conversation is learned: its `answers` (if null) or `all`; plain text is learned whole.
        packing: `concatenate`: the running text, cut where a block is full (plain text, if null). `separate`: whole
            documents share a block and none sees another (chat, if null). `pad`: one document to a row.
        block_size: Tokens in a block; memory and time of a training step grow with it.
        batch_size: Blocks in a batch, on each device.
        validation_fraction: Fraction of the tokens held out for validation, as whole documents and at least one block;
            of a single document, or where all are much longer than that, the tail of one.
        validation_blocks: Number of blocks to validate on, at most; null = all of them.
        calibration_blocks: Number of training blocks, drawn at random, that criteria and refits see, at most.
        num_workers: Number of processes that make batches; 0 is fastest, since the blocks are in memory.
        seed: Decides the validation part, the training order and the calibration blocks.

    Raises:
        InputError: With every mistake in the arguments, before anything is loaded.
    """

    def __init__(
        self,
        *,
        tokenizer: str | Path | None = None,
        path: Given | None = None,
        validation_path: Given | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        split: str = "train",
        generate: Generate | None = None,
        mixture: list[Part] | None = None,
        streaming: bool = False,
        streaming_window: int = WINDOW,
        text_column: str = TEXT,
        messages_column: str | None = None,
        prompt_column: str | None = None,
        response_column: str | None = None,
        chat_template: str | Path | None = None,
        learn: Learn | None = None,
        packing: Packing | None = None,
        block_size: int = 512,
        batch_size: int = 4,
        validation_fraction: float = FRACTION,
        validation_blocks: int | None = None,
        calibration_blocks: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.named_tokenizer = None if tokenizer is None else name_of("data.tokenizer", tokenizer)
        self.origin = Origin(
            path=None if path is None else files_of("data.path", path),
            validation_path=None if validation_path is None else files_of("data.validation_path", validation_path),
            dataset=dataset,
            dataset_config=dataset_config,
            split=split,
            generate=generate,
            mixture=mixture,
            columns=Columns(text_column, messages_column, prompt_column, response_column),
            window=streaming_window if streaming else None,
        )
        self.streaming_window = streaming_window
        self.chat_template = None if chat_template is None else path_of("data.chat_template", chat_template)
        self.learn = learn
        self.packing = packing
        self.block_size = block_size
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.validation_blocks = validation_blocks
        self.calibration_blocks = calibration_blocks
        self.num_workers = num_workers
        self.seed = seed
        self._blocks: dict[str, Blocks] = {}  # "training" and "validation", once set up
        self._read_by: str | None = None  # whose tokens they are
        if mistakes := [*self.origin.mistakes(), *self._mistakes()]:
            raise InputError("; ".join(mistakes) + ".")

    @property
    def tokenizer(self) -> str:
        """The model whose tokenizer is used."""
        return self.named_tokenizer or self._teacher or DEMO

    @property
    def _teacher(self) -> str | None:
        """Of what the trainer trains; None where there is none."""
        taught = None if self.trainer is None else self.trainer.lightning_module
        return taught.teacher_name if isinstance(taught, Taught) else None

    def prepare_data(self) -> None:
        """Fetches what comes from the hub, unpacks the demo model, lets the teacher write; once per machine."""
        load_tokenizer(self.tokenizer)
        self.origin.fetch(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Reads, tokenises and packs; the second call does nothing, and every stage gets the same.

        Raises:
            InputError: The text cannot be read, is shorter than one block, or its tokens are not the teacher's.
        """
        self._check_tokenizer()
        if not self._blocks:
            self._read_by = self.tokenizer
            both = self.pack(self.read())
            self._blocks = {part: done.blocks for part, done in both.items()}
            held_out = self._blocks["validation"]
            self._blocks["validation"] = {name: rows[: self.validation_blocks] for name, rows in held_out.items()}
        if stage == "fit" and self.trainer is not None:  # before weights are loaded
            self._check_training_blocks()
            self._check_stream()

    def read(self) -> Corpus:
        """The text in tokens, divided into a training and a validation part.

        Raises:
            InputError: It cannot be read, or does not fit the settings.
        """
        return corpus_of(self.origin.sources(self.tokenizer), self.origin.held_out(), self._reading())

    def pack(self, corpus: Corpus) -> dict[str, Packed]:
        """Both parts, `training` and `validation`, in blocks.

        Raises:
            InputError: A part is shorter than one block, or nothing of it is learned.
        """
        filler = filler_of(load_tokenizer(self.tokenizer))
        parts = {"training": corpus.training, "validation": corpus.validation}
        both = {part: packed(tokens, self.block_size, corpus.packing, filler) for part, tokens in parts.items()}
        for part, done in both.items():
            self._check_part(part, done, len(parts[part].stream), corpus)
            rank_zero_info(f"{part}: {done.summary(corpus.long[part])}")
        return both

    def train_dataloader(self) -> DataLoader[Row] | StreamLoader:
        """Full batches in an order of their own every epoch, as many on every rank; resumable within the epoch."""
        self._check_training_blocks()
        if self.origin.window is not None:
            return self._stream_loader()
        return self._loader(ResumableLoader, self._blocks["training"])

    def _check_tokenizer(self) -> None:
        """To another model the same numbers mean other words."""
        used, teacher = self._read_by or self.tokenizer, self._teacher
        if teacher is None or used == teacher:
            return
        ours = load_tokenizer(used).get_vocab()
        try:
            theirs = load_tokenizer(teacher).get_vocab()
        except InputError:
            return  # a teacher in memory, or one that was saved without
        if ours != theirs:
            raise InputError(
                f"data.tokenizer={used!r} has another vocabulary than the teacher, {teacher!r}, to whom its tokens "
                f"mean other words: set tokenizer={teacher!r} in TextDataModule."
            )

    def _check_training_blocks(self) -> None:
        blocks, devices = len(self._blocks["training"]["input_ids"]), self._world[0]
        if blocks < self.batch_size * devices:
            raise InputError(
                f"data.batch_size={self.batch_size} on {devices} device(s) needs {self.batch_size * devices} training "
                f"blocks, but the text gives {blocks} of {self.block_size} tokens: lower data.batch_size or "
                "data.block_size, or give more text."
            )

    def _check_stream(self) -> None:
        if self.origin.window is not None and self.trainer is not None and self.trainer.max_steps < 1:
            raise InputError("data.streaming has no end: set trainer.max_steps, or data.streaming to false.")

    def val_dataloader(self) -> DataLoader[Row]:
        """The held-out blocks in order, none twice; several ranks share them evenly and leave a remainder out."""
        blocks, devices = self._blocks["validation"], self._world[0]
        if (count := len(blocks["input_ids"])) < devices:
            raise InputError(
                f"validation on {devices} devices needs as many blocks, but the text gives {count}: raise "
                "data.validation_fraction or data.validation_blocks, lower data.block_size, or use fewer devices."
            )
        return self._loader(DataLoader, blocks)

    def test_dataloader(self) -> DataLoader[Row]:
        """The held-out blocks, as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Row]:
        """The held-out blocks, as for validation; running text alone."""
        if not self._blocks["validation"].keys() <= {"input_ids", "labels"}:
            raise InputError(
                "predict goes on from the middle of a block of running text, and data.packing=separate or pad keeps "
                "documents apart: set data.packing to concatenate."
            )
        return self.val_dataloader()

    def training_blocks(self) -> Tensor:
        """Every training block in the text's order, int32; works without a trainer and before `setup`.

        Returns:
            Tokens [N, T]; where documents share a block, with their positions, [N, 2, T].

        Raises:
            InputError: Rows are padded, or the text is read bit by bit.
        """
        if self.origin.window is not None:
            raise InputError(
                "a teacher cache is made of all blocks of a text, and data.streaming reads it bit by bit: set it to "
                "false, or leave model.teacher_cache out."
            )
        self.setup()
        blocks = self._blocks["training"]
        if "attention_mask" in blocks:
            raise InputError(
                "a teacher cache is made of full blocks, and data.packing=pad pads them: set data.packing to separate "
                "or concatenate, or leave model.teacher_cache out."
            )
        if "position_ids" not in blocks:
            return blocks["input_ids"]
        return torch.stack([blocks["input_ids"], blocks["position_ids"].clamp(min=0)], dim=1)

    def calibration_batches(self) -> list[Batch]:
        """At most `calibration_blocks` training blocks, drawn by the seed, in the text's order; the same on every rank.

        Works without a trainer and before `setup`.
        """
        self.setup()
        blocks = self._blocks["training"]
        order = torch.randperm(len(blocks["input_ids"]), generator=generator(self.seed, "calibration"))
        chosen = order[: self.calibration_blocks].sort().values
        rows = list(zip(*(rows[chosen] for rows in blocks.values()), strict=True))
        return [
            batch_of(tuple(blocks), rows[start : start + self.batch_size])
            for start in range(0, len(rows), self.batch_size)
        ]

    @property
    def _world(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(self, kind: type[DataLoader[Row]], blocks: Blocks) -> DataLoader[Row]:
        training = kind is ResumableLoader
        rows = TensorDataset(*blocks.values())
        sampler: Sampler[int] = BlockSampler(rows, *self._world, shuffle=training, seed=self.seed, drop_last=True)
        if self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            kind, sampler = DataLoader, SequentialSampler(rows)  # all that Lightning accepts for overfit_batches
        return kind(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=training,
            num_workers=self.num_workers,
            collate_fn=partial(training_batch_of if training else batch_of, tuple(blocks)),
            generator=torch.Generator(),  # else every epoch would draw a number from the global one
        )

    def _reading(self) -> Reading:
        return Reading(
            load_tokenizer(self.tokenizer),
            template=self.chat_template,
            learn=self.learn,
            packing=self.packing,
            block_size=self.block_size,
            fraction=self.validation_fraction,
            seed=self.seed,
        )

    def _stream_loader(self) -> StreamLoader:
        trainer = self.trainer
        assert trainer is not None, "a stream is as long as its trainer says"
        reading, filler, first = self._reading(), filler_of(load_tokenizer(self.tokenizer)), self._blocks["training"]

        def blocks_of(row: int, documents: Documents) -> Blocks:
            if row == 0:  # without what is validated on
                return first
            packing = reading.packing_of([documents.kind])
            tokens = reading.fitted(reading.once(documents), documents.kind, packing)
            return packed(tokens, self.block_size, packing, filler).blocks

        share = Share(self.batch_size, *self._world, self.seed)
        batches = trainer.max_steps * trainer.accumulate_grad_batches
        return StreamLoader(self.origin.windows(), blocks_of, share, batches, crc32_of(first.values()))

    def _check_part(self, part: str, done: Packed, tokens: int, corpus: Corpus) -> None:
        if len(done) and done.learned:
            return
        more = ", raise data.validation_fraction, name a data.validation_path" if part == "validation" else ""
        if len(done) or corpus.packing != "concatenate":
            raise InputError(
                f"the {part} part of the text has nothing to learn in the first data.block_size={self.block_size} "
                f"tokens of its documents: raise data.block_size{more} or give more text."
            )
        raise InputError(
            f"the {part} part of the text has {tokens} tokens, less than one block of "
            f"data.block_size={self.block_size}: lower data.block_size{more} or give more text."
        )

    def _mistakes(self) -> Iterator[str]:
        if self.named_tokenizer == "":
            yield "data.tokenizer is empty: name a local folder, a hub model or demo:smollm2"
        if self.chat_template is not None and not self.chat_template.is_file():
            yield f"data.chat_template={self.chat_template} is not a file: name one with a Jinja template"
        if self.origin.validation_path is not None and self.validation_fraction != FRACTION:
            yield f"data.validation_fraction={self.validation_fraction} does nothing beside validation_path: drop it"
        if self.origin.window is None and self.streaming_window != WINDOW:
            yield f"data.streaming_window={self.streaming_window} does nothing without data.streaming: drop it"
        if self.origin.window is not None and self.num_workers > 0:
            yield f"data.num_workers={self.num_workers}: a stream is read by the process that trains: set it to 0"
        least = {"block_size": 2, "batch_size": 1, "calibration_blocks": 1, "num_workers": 0, "streaming_window": 1}
        for field, minimum in least.items():
            if getattr(self, field) < minimum:
                yield f"data.{field}={getattr(self, field)} must be {minimum} or more"
        if self.validation_blocks is not None and self.validation_blocks < 1:
            yield f"data.validation_blocks={self.validation_blocks} must be 1 or more, or null for all"
        if not 0 < self.validation_fraction < 1:
            yield f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1, both excluded"
