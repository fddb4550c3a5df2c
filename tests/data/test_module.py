"""What the loaders hand out, what survives an interruption, and what a user is told."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lcprune.data.module import Batch, BlockSampler, ResumableLoader, TextDataModule
from lcprune.errors import InputError
from tests.marks import slow

Make = Callable[..., TextDataModule]


@pytest.fixture
def make(tiny_folder: Path) -> Make:
    """A small data module over the built-in text, set up; any argument can be given."""

    def build(**arguments: object) -> TextDataModule:
        small = {"tokenizer": str(tiny_folder), "block_size": 64, "batch_size": 4, "validation_blocks": 5}
        module = TextDataModule(**small | arguments)  # type: ignore[arg-type]
        module.setup("fit")
        return module

    return build


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Sixty documents, 1,260 tokens with their ends: 18 training blocks of 64 and one for validation."""
    path = tmp_path / "lines.jsonl"
    rows = (json.dumps({"text": f"document number {index:04}", "id": index}) for index in range(60))
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def rows_of(loader: object) -> list[list[int]]:
    assert isinstance(loader, torch.utils.data.DataLoader)
    return [row for batch in loader for row in batch["input_ids"].tolist()]


def test_batches_are_full_int64_blocks_whose_labels_are_the_inputs(make: Make):
    batch = next(iter(make().train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "scored"}
    assert batch["input_ids"].shape == (4, 64)
    assert batch["scored"].tolist() == [place for place in range(4 * 64) if place % 64 < 63]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["labels"].equal(batch["input_ids"])
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] != -100


def test_training_and_validation_share_no_block(make: Make):
    module = make()
    training = {tuple(row) for row in rows_of(module.train_dataloader())}
    validation = {tuple(row) for row in rows_of(module.val_dataloader())}
    assert len(training) > 1000
    assert len(validation) == 5
    assert not training & validation
    for other in (module.test_dataloader(), module.predict_dataloader()):
        assert {tuple(row) for row in rows_of(other)} == validation


def test_calibration_batches_are_training_blocks_and_the_same_every_time(make: Make):
    batches = make(calibration_blocks=6).calibration_batches()
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2]
    again = make(calibration_blocks=6).calibration_batches()
    assert all(one["input_ids"].equal(other["input_ids"]) for one, other in zip(batches, again, strict=True))
    training = {tuple(row) for row in rows_of(make(batch_size=1).train_dataloader())}
    assert {tuple(row) for batch in batches for row in batch["input_ids"].tolist()} <= training


def test_calibration_batches_are_in_the_order_of_the_text(make: Make, lines: Path):
    module = make(path=lines, calibration_blocks=6)
    blocks = module.training_blocks().tolist()
    places = [blocks.index(row) for batch in module.calibration_batches() for row in batch["input_ids"].tolist()]
    assert places == sorted(places)
    assert len(places) == 6


def test_calibration_batches_are_fewer_when_the_text_is_short(make: Make, lines: Path):
    assert sum(len(batch["labels"]) for batch in make(path=lines, calibration_blocks=99).calibration_batches()) == 18


def test_validation_file_leaves_the_whole_text_for_training(make: Make, lines: Path, tmp_path: Path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("held out " * 20, encoding="utf-8")
    module = make(path=lines, validation_path=held_out, batch_size=1)
    assert len(rows_of(module.train_dataloader())) == 60 * 21 // 64
    assert len(rows_of(module.val_dataloader())) == (9 * 20 + 1) // 64


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_of_every_kind_give_the_same_blocks(make: Make, lines: Path, tmp_path: Path, suffix: str):
    from datasets import Dataset

    data = Dataset.from_list([json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()])
    path = tmp_path / f"my [{suffix[1:]}] file{suffix}"
    match suffix:
        case ".csv":
            data.to_csv(path, index=False)
        case ".parquet":
            data.to_parquet(path)
        case ".json":
            path.write_text(json.dumps(data.to_list()), encoding="utf-8")
        case _:
            path.write_bytes(lines.read_bytes())
    expected = rows_of(make(path=lines).train_dataloader())
    assert rows_of(make(path=path).train_dataloader()) == expected


def test_text_file_is_one_document_whose_tail_is_validated_on(make: Make, tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{index:04}\n" for index in range(200)), encoding="utf-8")
    module = make(path=path, batch_size=1, validation_fraction=0.2, validation_blocks=None)
    tokens = [token for row in rows_of(module.val_dataloader()) for token in row]
    assert len(rows_of(module.train_dataloader())) == 801 // 64
    assert len(tokens) == 200 // 64 * 64
    assert tokens[-1] != tokens[4]  # no end of document in the middle


def test_every_epoch_has_an_order_of_its_own_over_the_same_blocks(make: Make):
    loader = make(batch_size=1).train_dataloader()
    assert isinstance(loader.sampler, BlockSampler)
    first, again = list(loader.sampler), list(loader.sampler)
    loader.sampler.set_epoch(1)
    second = list(loader.sampler)
    other_seed = list(make(batch_size=1, seed=1).train_dataloader().sampler)
    assert first == again
    assert len({tuple(order) for order in (first, second, other_seed)}) == 3
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_ranks_get_equal_shares_and_no_block_twice(devices: int, shuffle: bool):
    blocks = TensorDataset(torch.arange(11))
    samplers = [BlockSampler(blocks, devices, rank, shuffle, seed=0, drop_last=True) for rank in range(devices)]
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(sampler) for sampler in samplers} == {11 // devices}
    assert len({index for share in shares for index in share}) == 11 // devices * devices


def test_iterating_leaves_the_global_random_state_alone(make: Make):
    module = make(calibration_blocks=4)
    before = torch.random.get_rng_state()
    next(iter(module.train_dataloader()))
    rows_of(module.val_dataloader())
    module.calibration_batches()
    assert torch.random.get_rng_state().equal(before)


class Recorder(L.LightningModule):
    """Notes the first tokens of every training batch: what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"].flatten().tolist())
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def record(module: TextDataModule, folder: Path, ckpt_path: Path | None = None, **trainer: object) -> list[list[int]]:
    """Trains with a checkpoint after every optimizer step; returns the batches seen."""
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    recorder = Recorder()
    L.Trainer(accelerator="cpu", callbacks=[keep], **quiet | trainer).fit(  # type: ignore[arg-type]
        recorder, datamodule=module, ckpt_path=ckpt_path, weights_only=ckpt_path is not None
    )
    return recorder.seen


@pytest.mark.parametrize(
    ("data", "trainer"),
    [
        ({}, {"max_epochs": 3, "accumulate_grad_batches": 2}),
        ({}, {"max_steps": 10, "val_check_interval": 2}),
        ({"num_workers": 2}, {"max_steps": 6, "limit_train_batches": 3}),
        *slow(
            ({}, {"max_epochs": 3}),
            ({}, {"max_steps": 10}),
            ({}, {"max_epochs": 3, "limit_train_batches": 3}),
            ({"num_workers": 2}, {"max_epochs": 2, "accumulate_grad_batches": 2}),
        ),
    ],
    ids=str,
)
def test_run_interrupted_at_any_step_sees_exactly_the_batches_that_were_left(
    make: Make, lines: Path, tmp_path: Path, data: dict[str, Any], trainer: dict[str, Any]
):
    arguments = {"path": lines, "block_size": 64, "batch_size": 4} | data  # 4 batches an epoch
    whole = record(make(**arguments), tmp_path / "whole", **trainer)
    limit, accumulate = trainer.get("limit_train_batches", 4), trainer.get("accumulate_grad_batches", 1)
    assert len({str(batch) for batch in whole}) == len(whole)
    checkpoints = list((tmp_path / "whole").glob("*.ckpt"))
    assert len(checkpoints) == trainer.get("max_steps", trainer.get("max_epochs", 0) * -(-limit // accumulate))
    for checkpoint in checkpoints:
        epochs, steps = divmod(int(checkpoint.stem.split("=")[1]), -(-limit // accumulate))
        done = epochs * limit + steps * accumulate
        rest = record(make(**arguments), tmp_path / "rest", checkpoint, **trainer)
        assert rest == whole[done:], checkpoint.name


def test_run_stopped_by_an_error_in_the_middle_of_an_epoch_resumes_behind_its_last_checkpoint(
    make: Make, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = record(make(path=lines), tmp_path / "whole", max_epochs=3)
    seen_by_stopped: list[int] = []

    def stop(self: Recorder, *_: object) -> None:
        seen_by_stopped.append(len(self.seen))
        if len(self.seen) == 6:
            raise KeyError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_train_batch_start", stop)
        with pytest.raises(KeyError, match="power cut"):
            record(make(path=lines), tmp_path / "stopped", max_epochs=3)
    rest = record(make(path=lines), tmp_path / "rest", tmp_path / "stopped" / "step=6.ckpt", max_epochs=3)
    assert rest == whole[6:]


def test_loader_position_means_nothing_over_other_batches(make: Make, lines: Path):
    loader = make(path=lines).train_dataloader()
    assert isinstance(loader, ResumableLoader)
    iterator = iter(loader)
    next(iterator)
    middle = loader.state_dict()
    other = make(path=lines, batch_size=2).train_dataloader()
    assert isinstance(other, ResumableLoader)
    with pytest.raises(InputError, match="batch_size was 4, is 2"):
        other.load_state_dict(middle)
    assert len(list(iterator)) == 3
    other.load_state_dict(loader.state_dict())  # a whole epoch: whatever comes next is new anyway
    assert other.state_dict()["epoch"] == 1


def test_loader_says_what_is_other_than_in_the_checkpoint(
    make: Make, lines: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch.utilities.rank_zero"), "propagate", True)
    caplog.set_level(logging.INFO)
    loader = make(path=lines).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    make(path=lines, num_workers=2).train_dataloader().load_state_dict(loader.state_dict())
    assert "data.num_workers was 0, is 2: the batches stay the same" in caplog.text
    assert "others than the checkpoint's" not in caplog.text
    list(iterator)
    make(path=lines, batch_size=2).train_dataloader().load_state_dict(loader.state_dict())
    assert "from this epoch on the batches are others than the checkpoint's: batches was" in caplog.text
    assert "batch_size was 4, is 2" in caplog.text


def test_run_goes_on_with_other_workers(make: Make, lines: Path, tmp_path: Path):
    whole = record(make(path=lines), tmp_path / "whole", max_steps=6)
    rest = record(make(path=lines, num_workers=1), tmp_path / "rest", tmp_path / "whole" / "step=2.ckpt", max_steps=6)
    assert rest == whole[2:]


def test_loader_says_which_blocks_are_in_a_batch(make: Make, lines: Path):
    module = make(path=lines)
    loader = module.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    loader.sampler.set_epoch(3)
    batches = list(loader)
    assert all(
        torch.equal(batch["input_ids"].int(), module.training_blocks()[loader.blocks_of(index)].int())
        for index, batch in enumerate(batches)
    )
    assert len(batches) == 4


def test_loader_starts_over_when_it_is_iterated_again(make: Make, lines: Path):
    loader = make(path=lines).train_dataloader()
    next(iter(loader))
    assert len(rows_of(loader)) == 16


def test_overfit_batches_shows_the_same_batches_every_epoch(make: Make, lines: Path, tmp_path: Path):
    seen = record(make(path=lines), tmp_path, max_epochs=2, overfit_batches=2)
    assert seen[:2] == seen[2:]


def test_mistakes_are_told_all_at_once_before_anything_is_loaded(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "old.doc").write_text("x", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        TextDataModule(
            tokenizer="no/such-model",
            path=tmp_path / "old.doc",
            validation_path=tmp_path / "empty.txt",
            dataset="some/set",
            block_size=1,
            batch_size=0,
            validation_fraction=1.0,
            validation_blocks=0,
            calibration_blocks=0,
            num_workers=-1,
        )
    message = str(caught.value)
    mistakes = ("are both set", "'.doc'", "empty.txt is empty", "block_size=1", "batch_size=0", "fraction=1.0")
    more = ("validation_blocks=0", "calibration_blocks=0", "num_workers=-1")
    assert [mistake for mistake in (*mistakes, *more) if mistake not in message] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"path": Path("nowhere.jsonl")}, "does not exist"),
        ({"path": Path("/dev/null")}, "is not a file"),
        ({"tokenizer": ""}, "data.tokenizer is empty"),
        (
            {"dataset": Dataset.from_dict({"text": ["a"]})},
            r'data.dataset=<Dataset> .* \(dataset.to_json\("my.jsonl"\)\)',
        ),
        ({"split": "test"}, "belong to data.dataset"),
        ({"dataset_config": "en"}, "belong to data.dataset"),
    ],
)
def test_wrong_argument_is_refused(arguments: dict[str, object], words: str):
    with pytest.raises(InputError, match=words):
        TextDataModule(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"body": "x", "id": 1}', "data.text_column='text' is not in .* columns body, id"),
        ("a.jsonl", '{"text": 1}', "holds int values, not text"),
        ("a.jsonl", '{"text": "x', "could not be read .*JSON"),
        ("a.jsonl", "\n", "could not be read"),
        ("a.jsonl", '{"text": " "}', "holds no text"),
        ("a.txt", " \n", "is blank"),
        ("a.txt", "\udcff", "could not be read .*utf-8"),
        ("a.parquet", "x", "could not be read"),
        ("a.txt", "x" * 40, "training part of the text has 41 tokens.*data.block_size=64"),
        ("a.txt", "x" * 100, "validation part of the text has 37 tokens.*data.block_size=64"),
    ],
)
def test_file_that_gives_no_blocks_is_named_with_the_reason(
    make: Make, tmp_path: Path, name: str, content: str, words: str
):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=words):
        make(path=tmp_path / name)


def test_data_set_that_cannot_be_had_is_named_with_both_ways_out(make: Make):
    with pytest.raises(InputError, match=r"no/such.*network.*data\.path"):
        make(dataset="no/such")


def test_batch_larger_than_the_text_is_refused(make: Make, lines: Path):
    with pytest.raises(InputError, match="needs 32 training blocks, but the text gives 18"):
        make(path=lines, batch_size=32).train_dataloader()


def test_settings_without_an_effect_are_refused(tmp_path: Path):
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("words")
    rows.write_text('{"body": "words"}')
    with pytest.raises(InputError, match=r"validation_fraction=0\.1 does nothing beside validation_path"):
        TextDataModule(tokenizer="t", path=text, validation_path=text, validation_fraction=0.1)
    for path in (text, None):
        with pytest.raises(InputError, match="text_column='body' does nothing for text without columns"):
            TextDataModule(tokenizer="t", path=path, text_column="body")
    TextDataModule(tokenizer="t", path=text, validation_path=rows, text_column="body")
