"""What a merge is measured on: the batches that validation takes, whatever loader yields them, or none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from lcprune import DistillationModule, Evenly, ProgressiveCollapse, TextDataModule
from lcprune.distillation.merges import measure
from lcprune.errors import InputError
from lcprune.merging.calibration import Batch
from tests.distillation import runs


@pytest.mark.parametrize(("limit", "batches"), [(0.5, 1), (1.0, 3), (1, 1), (2, 2), (9, 3)])
def test_measurement_takes_the_batches_that_validation_takes(
    tiny_folder: Path, text: Path, tmp_path: Path, limit: float, batches: int, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    observe = DistillationModule.observe
    monkeypatch.setattr(
        DistillationModule, "observe", lambda *given: (seen.append(len(given[1]["labels"])), observe(*given))
    )
    module = runs.student_of(tiny_folder)
    data = runs.data_for(tiny_folder, text, validation_blocks=6)
    trainer = runs.trainer_for(tmp_path, limit_val_batches=limit)
    trainer.validate(module, data, verbose=False)
    by_lightning = len(seen)
    measure(trainer, module)
    assert (by_lightning, len(seen) - by_lightning) == (batches, batches)


def test_measurement_leaves_out_dropout_and_leaves_the_student_training(text: Path, tmp_path: Path):
    teacher = runs.save_teacher(tmp_path / "teacher", dropout=0.5)
    module, trainer = runs.student_of(teacher), runs.trainer_for(tmp_path)
    trainer.validate(module, runs.data_for(teacher, text), verbose=False)
    module.student.train()
    first, second = (measure(trainer, module) for _ in range(2))
    assert first == second
    assert module.student.training


class Modes(Callback):
    """Whether the student is in training mode, by step."""

    def __init__(self) -> None:
        self.seen: dict[int, bool] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
        self.seen[trainer.global_step] = all(module.training for module in pl_module.student.modules())


def test_student_goes_on_training_behind_merges(tiny_folder: Path, text: Path, tmp_path: Path):
    modes = Modes()
    trainer = runs.trainer_for(tmp_path, modes, runs.two_merges(), max_steps=9)
    trainer.fit(runs.student_of(tiny_folder), datamodule=runs.data_for(tiny_folder, text))
    assert modes.seen == dict.fromkeys(range(9), True)


def test_merge_without_validation_measures_nothing_it_has_not_seen(tiny_folder: Path, text: Path, tmp_path: Path):
    module = runs.student_of(tiny_folder)
    trainer = runs.trainer_for(tmp_path, runs.two_merges(), limit_val_batches=0)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert module.history.depth == 4
    for step in module.history.steps:
        assert step.measured == {}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_data_without_a_validation_loader_is_merged_unmeasured(tiny_folder: Path, text: Path, tmp_path: Path):
    class TrainingOnly(LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.source = runs.data_for(tiny_folder, text)
            self.calibration_batches = self.source.calibration_batches

        def setup(self, stage: str) -> None:
            self.source.trainer = self.trainer
            self.source.setup(stage)

        def train_dataloader(self) -> object:
            return self.source.train_dataloader()

    module = runs.student_of(tiny_folder)
    trainer = runs.trainer_for(tmp_path, runs.two_merges(), max_steps=9)
    trainer.fit(module, datamodule=TrainingOnly())
    assert [step.measured for step in module.history.steps] == [{}, {}]


class Validated(LightningDataModule):
    """Trains on a text, validates on what it is given."""

    def __init__(self, inner: TextDataModule, loaders: object) -> None:
        super().__init__()
        self.inner, self.loaders = inner, loaders

    def setup(self, stage: str | None = None) -> None:
        self.inner.setup()

    def train_dataloader(self) -> object:
        return self.inner.train_dataloader()

    def val_dataloader(self) -> object:
        return self.loaders

    def calibration_batches(self) -> list[Batch]:
        return self.inner.calibration_batches()


class Endless(IterableDataset[Batch]):
    """Batches without a length."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def test_validation_without_a_length_is_measured_at_a_merge(tiny_folder: Path, text: Path, tmp_path: Path):
    inner, module = runs.data_for(tiny_folder, text), runs.student_of(tiny_folder)
    loader = DataLoader(Endless(inner.calibration_batches()), batch_size=None)
    trainer = runs.trainer_for(tmp_path, ProgressiveCollapse(Evenly(5)), max_steps=1, limit_val_batches=1.0)
    trainer.fit(module, datamodule=Validated(inner, loader))
    assert module.history.steps[-1].measured["val/perplexity"] > 1


def test_several_validation_loaders_are_refused_in_one_sentence(tiny_folder: Path, text: Path, tmp_path: Path):
    inner = runs.data_for(tiny_folder, text)
    loaders = [DataLoader(Endless(inner.calibration_batches()), batch_size=None)] * 2
    trainer = runs.trainer_for(tmp_path, ProgressiveCollapse(Evenly(5)), max_steps=1, limit_val_batches=1.0)
    with pytest.raises(InputError, match="validates on one loader"):
        trainer.fit(runs.student_of(tiny_folder), datamodule=Validated(inner, loaders))
