"""ProgressiveCollapse on a LightningModule of the user's own: a Hugging Face model and a training step, no more."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from lcprune import (
    AtSteps,
    Concat,
    Evenly,
    FixedPlan,
    InputError,
    MergeHistory,
    MergeStep,
    ProgressiveCollapse,
    RidgeRefit,
    TextDataModule,
)
from lcprune.distillation.checkpoint import load_student
from lcprune.distillation.guests import Guest
from lcprune.distillation.triggers import ByTokens
from lcprune.errors import RunError
from lcprune.merging.calibration import Batch
from tests.builders import tiny_llama
from tests.distillation.runs import checkpoints_in, data_for, equal, save_teacher, trainer_for, weights_of, write_text

pytestmark = pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")


class Mine(LightningModule):
    """What a user writes: cross-entropy on the text, nothing of lcprune in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Later(Mine):
    """The model is made in configure_model."""

    def __init__(self, folder: Path) -> None:
        LightningModule.__init__(self)
        self.folder, self.model = folder, None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder)


class Two(LightningModule):
    """Two models, one of them called the student."""

    def __init__(self, **models: PreTrainedModel) -> None:
        super().__init__()
        for name, model in models.items():
            setattr(self, name, model)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "model", dropout=0.1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def collapse(**settings: object) -> ProgressiveCollapse:
    """Six layers: five after step 2, four after step 4."""
    return ProgressiveCollapse(AtSteps({2: 5, 4: 4}), planner=FixedPlan([[1, 2], [3, 4]]), **settings)  # type: ignore[arg-type]


def run(module: LightningModule, folder: Path, teacher: Path, text: Path, **settings: object) -> Trainer:
    """Six steps with a checkpoint at each."""
    trainer = trainer_for(folder, collapse(), checkpoints_in(folder), max_steps=settings.pop("max_steps", 6))
    trainer.fit(module, datamodule=data_for(teacher, text), **settings)  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize("kind", [Mine, Later])
def test_guest_becomes_shorter_while_it_trains(kind: type[Mine], teacher: Path, text: Path, tmp_path: Path):
    module = kind(teacher)
    trainer = run(module, tmp_path, teacher, text)
    assert len(module.model.model.layers) == module.model.config.num_hidden_layers == 4
    assert module.history.lineage == ((0,), (1, 2), (3, 4), (5,))
    assert [step.global_step for step in module.history.steps] == [2, 4]
    held = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters()}


def test_guest_that_was_interrupted_ends_like_one_that_was_not(teacher: Path, text: Path, tmp_path: Path):
    torch.manual_seed(0)
    run(whole := Mine(teacher), tmp_path / "whole", teacher, text)
    torch.manual_seed(0)
    run(Mine(teacher), tmp_path / "parts", teacher, text, max_steps=5)
    torch.manual_seed(7)
    again = Mine(teacher)
    run(again, tmp_path / "parts", teacher, text, ckpt_path=str(tmp_path / "parts" / "last.ckpt"))
    assert again.history == whole.history
    assert equal(weights_of(again), weights_of(whole))


def test_guest_goes_on_in_the_same_object(teacher: Path, text: Path, tmp_path: Path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *others: object) -> None:
            trainer.should_stop = trainer.global_step == 3

    module = Mine(teacher)
    trainer = trainer_for(tmp_path, Stop(), collapse(), checkpoints_in(tmp_path), max_steps=6)
    with pytest.warns(UserWarning, match="the run ends with 5 layers"):
        trainer.fit(module, datamodule=data_for(teacher, text))
    assert [step.global_step for step in module.history.steps] == [2]
    run(module, tmp_path, teacher, text, ckpt_path=str(tmp_path / "last.ckpt"))
    assert [step.global_step for step in module.history.steps] == [2, 4]


def test_second_run_of_a_guest_merges_on_from_where_the_first_one_ended(teacher: Path, text: Path, tmp_path: Path):
    module = Mine(teacher)
    for depth in (5, 4):
        callback = ProgressiveCollapse(Evenly(depth), planner=FixedPlan([[1, 2], [3, 4]]))
        trainer_for(tmp_path, callback, max_steps=2).fit(module, datamodule=data_for(teacher, text))
        assert module.model.config.num_hidden_layers == depth
    assert [step.global_step for step in module.history.steps] == [None, 0]


def test_guest_resumed_with_its_model_made_later_has_the_depth_of_its_checkpoint(
    teacher: Path, text: Path, tmp_path: Path
):
    run(Mine(teacher), tmp_path, teacher, text, max_steps=5)
    again = Later(teacher)
    run(again, tmp_path, teacher, text, ckpt_path=str(tmp_path / "last.ckpt"))
    assert [step.global_step for step in again.history.steps] == [2, 4]
    assert len(again.model.model.layers) == 4


def test_guest_in_a_weights_only_checkpoint_can_be_exported(teacher: Path, text: Path, tmp_path: Path):
    module = Mine(teacher)
    trainer = run(module, tmp_path, teacher, text)
    trainer.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)
    student, record = load_student(tmp_path / "light.ckpt")
    assert record.history == module.history
    assert equal(weights_of(student), weights_of(module.model))


def test_guest_is_repaired_towards_itself_before_the_merge(teacher: Path, text: Path, tmp_path: Path):
    batches = data_for(teacher, text).calibration_batches()

    def distance(refit: RidgeRefit | None) -> float:
        module = Mine(teacher)
        with torch.no_grad():
            before = module.model.eval()(batches[0]["input_ids"]).logits
        callback = ProgressiveCollapse(Evenly(4), planner=FixedPlan([[1, 2], [3, 4]]), refit=refit)
        # Nothing is learned: what the merge at step 0 leaves is looked at.
        trainer = trainer_for(tmp_path, callback, max_steps=1)
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
        trainer.fit(module, datamodule=data_for(teacher, text))
        with torch.no_grad():
            return float((module.model.eval()(batches[0]["input_ids"]).logits - before).square().mean())

    assert distance(RidgeRefit()) < 0.8 * distance(None)


def test_guest_with_a_history_goes_on_from_it():
    module = Two(model=tiny_llama(5))
    module.history = MergeHistory(6, (MergeStep((1, 2), {"class_path": "Drop"}, (1.0, 0.0)),))
    assert Guest(module).begun.lineage == ((0,), (1, 2), (3,), (4,), (5,))


@pytest.mark.parametrize(
    ("models", "words"),
    [({}, "none among its attributes"), ({"left": tiny_llama(2), "right": tiny_llama(2)}, r"several \(left, right\)")],
)
def test_guest_without_one_model_is_refused(models: dict[str, PreTrainedModel], words: str):
    with pytest.raises(InputError, match=words):
        Guest(Two(**models))


def test_guest_with_several_models_names_its_student():
    student = tiny_llama(2)
    assert Guest(Two(judge=tiny_llama(2), student=student)).student is student


def test_guest_whose_history_is_something_else_is_refused():
    module = Two(model=tiny_llama(2))
    module.history = [0.5, 0.4]
    with pytest.raises(InputError, match=r"Two\.history is a list"):
        _ = Guest(module).history


def test_guest_refuses_the_checkpoint_of_another_model(teacher: Path, text: Path, tmp_path: Path):
    run(Mine(teacher), tmp_path / "run", teacher, text, max_steps=5)
    other = save_teacher(tmp_path / "other", model=tiny_llama(tied=False))
    with pytest.raises(InputError, match="tie_word_embeddings True"):
        run(Mine(other), tmp_path / "run", other, text, ckpt_path=str(tmp_path / "run" / "last.ckpt"))


def test_guest_target_depth_that_does_not_fit_is_refused_before_training(teacher: Path, text: Path, tmp_path: Path):
    trainer = trainer_for(tmp_path, ProgressiveCollapse(Evenly(9)))
    with pytest.raises(InputError, match="must lie between 1 and 5"):
        trainer.fit(Mine(teacher), datamodule=data_for(teacher, text))
    assert trainer.global_step == 0


class OnTuples(Mine):
    """A step that takes what its own loader yields."""

    validation_step = LightningModule.validation_step

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0], labels=batch[0]).loss


class Tuples(LightningDataModule):
    """Batches that are lists of tensors."""

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self.blocks = blocks

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.blocks), batch_size=2)

    def calibration_batches(self) -> list[Batch]:
        return [{"input_ids": self.blocks[:2]}]


def test_guest_may_have_batches_of_any_form_unless_tokens_are_counted(teacher: Path, tmp_path: Path):
    data = Tuples(torch.randint(2, 90, (12, 16), generator=torch.Generator().manual_seed(0)))
    trainer_for(tmp_path, collapse(), max_steps=5, limit_val_batches=0).fit(module := OnTuples(teacher), data)
    assert module.history.depth == 4
    by_tokens = ProgressiveCollapse(ByTokens(AtSteps({64: 5})))
    with pytest.raises(InputError, match="ByTokens counts the `input_ids` of every batch, and this one is a list"):
        trainer_for(tmp_path, by_tokens, max_steps=5, limit_val_batches=0).fit(OnTuples(teacher), data)


class Written(LightningDataModule):
    """Hands out what it is given, once read each time."""

    def __init__(self, inner: TextDataModule, batches: Sequence[object]) -> None:
        super().__init__()
        self.inner, self.batches = inner, batches

    def train_dataloader(self) -> object:
        self.inner.setup()
        return self.inner.train_dataloader()

    def val_dataloader(self) -> object:
        return self.inner.val_dataloader()

    def calibration_batches(self) -> Iterator[object]:
        yield from self.batches


@pytest.mark.parametrize("settings", [{"refit": RidgeRefit(), "max_perplexity_jump": 50.0}, {"operator": Concat()}])
def test_guest_merges_by_text_from_a_generator_as_by_that_from_a_list(
    settings: dict[str, object], teacher: Path, text: Path, tmp_path: Path
):
    inner = data_for(teacher, text)
    written = Written(inner, inner.calibration_batches())
    found = []
    for data in (inner, written):
        torch.manual_seed(0)
        module = Mine(teacher)
        trainer_for(tmp_path, collapse(**settings), max_steps=5, limit_val_batches=0).fit(module, data)
        found.append(weights_of(module))
    assert equal(*found)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], r"calibration_batches\(\) of Written hands out no batches, and merges are planned by text: let it return"),
        (["text"], r"calibration_batches\(\) of Written: batches\[0\] is a str, and must hold input_ids"),
    ],
)
def test_guest_without_text_is_refused_by_the_name_of_its_data_module(
    batches: list[object], words: str, teacher: Path, text: Path, tmp_path: Path
):
    data = Written(data_for(teacher, text), batches)
    with pytest.raises(InputError, match=words):
        trainer_for(tmp_path, collapse(), max_steps=5, limit_val_batches=0).fit(Mine(teacher), data)


def test_guest_that_is_just_merging_is_not_saved(teacher: Path, text: Path, tmp_path: Path):
    trainer = run(module := Mine(teacher), tmp_path, teacher, text, max_steps=5)
    with pytest.raises(RunError, match="A merge was changing"), Guest(module).boundary.changing("A merge"):
        trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert not (tmp_path / "half.ckpt").exists()


def test_merges_of_an_earlier_run_are_not_this_runs(teacher: Path, text: Path, tmp_path: Path):
    once = ProgressiveCollapse(AtSteps({2: 5}), planner=FixedPlan([[1, 2]]))
    trainer_for(tmp_path / "first", once, max_steps=3).fit(first := Mine(teacher), data_for(teacher, text))
    more = ProgressiveCollapse(AtSteps({2: 4}), planner=FixedPlan([[1, 2], [3, 4]]))
    trainer_for(tmp_path, more, max_steps=3).fit(first, data_for(teacher, text))
    assert [step.global_step for step in first.history.steps] == [None, 2]
    assert first.history.depth == 4
