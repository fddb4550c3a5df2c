"""A stream is read window by window, loses nothing on the way, and goes on where it was interrupted."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lcprune.data.columns import Columns, Documents
from lcprune.data.module import TextDataModule
from lcprune.data.packing import Blocks
from lcprune.data.streaming import Share, StreamLoader, Windows
from lcprune.errors import InputError
from tests import builders
from tests.data.test_module import Recorder, record


def windows(rows: int = 10, size: int = 4) -> Windows:
    texts = [{"text": f"{number}"} for number in range(rows)]
    return Windows(lambda row: iter(texts[row:]), size, Columns(), "here")


def blocks_of(row: int, documents: Documents) -> Blocks:
    """A block of two tokens to a document: its number, twice."""
    return {"input_ids": torch.tensor([[int(text)] * 2 for text in documents.texts], dtype=torch.int32)}


def loader(batch_size: int = 1, devices: int = 1, rank: int = 0, **stream: int) -> StreamLoader:
    return StreamLoader(windows(**stream), blocks_of, Share(batch_size, devices, rank, seed=0), 100, text_crc32=1)


def taken(source: StreamLoader, count: int) -> list[list[int]]:
    """The documents of so many batches."""
    return [batch["input_ids"][:, 0].tolist() for _, batch in zip(range(count), source, strict=False)]


def test_every_round_has_every_document_once_window_by_window_in_an_order_of_its_own():
    numbers = [number for batch in taken(loader(), 20) for number in batch]
    first, second = numbers[:10], numbers[10:]
    for part in (first, second):
        assert [sorted(part[begin:end]) for begin, end in ((0, 4), (4, 8), (8, 10))] == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
            [8, 9],
        ]
    assert first != second


@pytest.mark.parametrize("stop", range(26))
def test_stream_interrupted_anywhere_goes_on_with_the_batches_that_were_left(stop: int):
    whole = taken(loader(), 30)
    begun = loader()
    iterator = iter(begun)
    for _ in range(stop):
        next(iterator)
    resumed = loader()
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert taken(resumed, 30 - stop) == whole[stop:]


def test_ranks_have_equally_many_batches_and_no_document_twice():
    shares = [taken(loader(batch_size=2, devices=2, rank=rank, rows=19, size=9), 4) for rank in (0, 1)]
    assert [len(share) for share in shares] == [4, 4]
    numbers = [number for share in shares for batch in share for number in batch]
    assert len(set(numbers)) == 16


def test_stream_without_enough_for_a_batch_in_any_window_is_refused():
    with pytest.raises(InputError, match="no window of the stream has enough text"):
        taken(loader(batch_size=5), 1)


def test_position_in_a_stream_of_other_batches_is_refused():
    other = loader(batch_size=2)
    with pytest.raises(InputError, match="batch_size was 1, is 2"):
        other.load_state_dict(loader().state_dict())


def test_window_with_nothing_in_it_is_passed_over_unless_it_is_the_first():
    def opened(blank: range) -> Windows:
        texts = [{"text": " " if number in blank else f"{number}"} for number in range(10)]
        return Windows(lambda row: iter(texts[row:]), 4, Columns(), "here")

    source = StreamLoader(opened(range(4, 8)), blocks_of, Share(1, 1, 0, seed=0), 100, text_crc32=1)
    assert sorted(number for batch in taken(source, 6) for number in batch) == [0, 1, 2, 3, 8, 9]
    with pytest.raises(InputError, match="rows 0 to 3 holds no text"):
        opened(range(4)).first()


def test_stream_without_rows_is_refused():
    with pytest.raises(InputError, match="here has no rows"):
        windows(rows=0).first()


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., TextDataModule]:
    """A stream of 60 pairs in windows of 16."""
    path = tmp_path / "chat.jsonl"
    rows = ({"prompt": f"number {index:04}", "response": f"it is {index:04}"} for index in range(60))
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def build(**settings: object) -> TextDataModule:
        usual = {"path": path, "streaming": True, "streaming_window": 16, "block_size": 96, "batch_size": 2}
        return TextDataModule(tokenizer=str(tiny_folder), **usual | settings)  # type: ignore[arg-type]

    return build


@pytest.mark.parametrize("accumulate", [1, 2])
def test_run_on_a_stream_interrupted_at_any_step_sees_exactly_what_was_left(
    make: Callable[..., TextDataModule], tmp_path: Path, accumulate: int
):
    settings = {"max_steps": 8, "accumulate_grad_batches": accumulate, "max_epochs": -1}
    whole = record(make(), tmp_path / "whole", **settings)
    assert len(whole) == 8 * accumulate
    for step in (1, 4, 7):
        rest = record(make(), tmp_path / "rest", tmp_path / "whole" / f"step={step}.ckpt", **settings)
        assert rest == whole[step * accumulate :]


def test_epoch_of_a_run_on_a_stream_is_all_the_batches_that_it_takes(make: Callable[..., TextDataModule]):
    trainer = Trainer(
        max_steps=6,
        max_epochs=-1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Recorder(), datamodule=make())
    assert (trainer.global_step, trainer.num_training_batches, trainer.current_epoch) == (6, 12, 1)


def test_stream_of_another_text_is_not_gone_on_with(make: Callable[..., TextDataModule], tmp_path: Path):
    settings = {"max_steps": 2, "max_epochs": -1}
    record(make(), tmp_path / "whole", **settings)
    other = tmp_path / "other.jsonl"
    other.write_text((tmp_path / "chat.jsonl").read_text().replace("number 0000", "number 0009"))
    with pytest.raises(InputError, match=r"text_crc32 was \d+, is \d+"):
        record(make(path=other), tmp_path / "rest", tmp_path / "whole" / "step=1.ckpt", **settings)


def test_validation_and_calibration_of_a_stream_come_from_its_first_window(make: Callable[..., TextDataModule]):
    module = make(batch_size=1)
    module.setup()
    validation = {int(token) for batch in module.val_dataloader() for token in batch["input_ids"].unique()}
    assert validation
    training = [row for batch in module.calibration_batches() for row in batch["input_ids"].tolist()]
    assert 0 < len(training) <= 8
    held_out = [row for batch in module.val_dataloader() for row in batch["input_ids"].tolist()]
    assert not {tuple(row) for row in training} & {tuple(row) for row in held_out}


def test_run_on_a_stream_never_sees_what_it_is_validated_on(make: Callable[..., TextDataModule], tmp_path: Path):
    def answers(rows: list[list[int]]) -> set[str]:
        tokenizer = builders.tiny_tokenizer()
        return {answer for row in rows for answer in re.findall(r"it is \d{4}", tokenizer.decode(row))}

    module = make(batch_size=1)
    module.setup()
    held_out = answers([row for batch in module.val_dataloader() for row in batch["input_ids"].tolist()])
    seen = answers(record(make(batch_size=1), tmp_path, max_steps=40, max_epochs=-1))
    assert held_out
    assert len(seen) > 50
    assert not seen & held_out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": None}, r"data\.streaming reads data\.path or data\.dataset"),
        ({"streaming": False}, r"streaming_window=16 does nothing without data\.streaming"),
        ({"streaming_window": 0}, r"data\.streaming_window=0 must be 1 or more"),
        ({"num_workers": 2}, r"data\.num_workers=2: a stream is read by the process that trains: set it to 0"),
    ],
)
def test_setting_that_does_not_go_with_a_stream_is_refused(
    make: Callable[..., TextDataModule], settings: dict[str, object], words: str
):
    with pytest.raises(InputError, match=words):
        make(**settings)


def test_stream_of_a_file_that_is_not_read_row_by_row_is_refused(make: Callable[..., TextDataModule], tmp_path: Path):
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(InputError, match=r"cannot read .*text\.txt row by row"):
        make(path=tmp_path / "text.txt")


def test_stream_without_an_end_and_cache_of_a_stream_are_refused(make: Callable[..., TextDataModule], tmp_path: Path):
    module = make()
    module.trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    with pytest.raises(InputError, match=r"has no end: set trainer\.max_steps"):
        module.setup("fit")
    with pytest.raises(InputError, match="teacher cache"):
        module.training_blocks()
