"""What the module trains and what it logs, against transformers' own figures."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lcprune import AtSteps, DistillationModule, Drop, FixedPlan, Labels, Logits, ProgressiveCollapse
from lcprune.distillation import resumable
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeStep
from tests.distillation import runs

STEP = MergeStep((1, 2), {"class_path": "Drop"}, (0.0, 1.0))


def at_once() -> ProgressiveCollapse:
    return ProgressiveCollapse(AtSteps({0: 5}), planner=FixedPlan([[1, 2]]), operator=Drop("last"))


def test_building_a_module_loads_nothing(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resumable, "load_pair", lambda *_: pytest.fail("weights were loaded"))
    module = runs.student_of(tiny_folder)
    assert module.history.teacher_depth == 6
    assert module.fingerprint["model_type"] == "llama"
    assert list(module.parameters()) == []
    runs.student_of(Path("no/such/model"))  # not even the name is looked at


def test_configure_model_twice_changes_nothing(tiny_folder: Path):
    module = runs.student_of(tiny_folder)
    module.configure_model()
    teacher, student, parameters = module.teacher, module.student, list(module.parameters())
    module.configure_model()
    assert module.teacher is teacher
    assert module.student is student
    assert all(now is then for now, then in zip(module.parameters(), parameters, strict=True))


def test_module_refuses_an_objective_of_nothing(tiny_folder: Path):
    with pytest.raises(InputError, match="objective="):
        runs.student_of(tiny_folder, objective=[])


@pytest.mark.parametrize("wrong", [{"train": "layer"}, {"dtype": "float31"}, {"teacher_dtype": "half"}])
def test_module_refuses_a_word_it_does_not_know(tiny_folder: Path, wrong: dict[str, str]):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}="):
        runs.student_of(tiny_folder, **wrong)


@pytest.mark.parametrize("train", ["all", "layers"])
def test_one_step_moves_every_trained_parameter_and_no_other(tiny_folder: Path, text: Path, tmp_path: Path, train: str):
    module = runs.student_of(tiny_folder, train=train)
    seen: dict[str, Tensor] = {}

    class Start(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
            seen.update(runs.weights_of(pl_module))

    trainer = runs.trainer_for(tmp_path, at_once(), Start(), max_steps=1)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    moved = {name for name, parameter in module.named_parameters() if not parameter.equal(seen[name])}
    layers = {name for name in seen if ".layers." in name}
    assert len(layers) == 5 * 9
    assert moved == (layers if train == "layers" else set(seen))


class Modes(Callback):
    """Whether any part of the student is in eval mode at a step, and whether any part trains in validation."""

    def __init__(self) -> None:
        self.training: list[bool] = []
        self.validation: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
        self.training.append(all(part.training for part in pl_module.student.modules()))
        assert pl_module.teacher is not None
        assert not any(part.training for part in pl_module.teacher.model.modules())

    def on_validation_batch_start(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
        self.validation.append(any(part.training for part in pl_module.student.modules()))


def test_student_is_in_train_mode_at_every_step(tiny_folder: Path, text: Path, tmp_path: Path):
    module, modes = runs.student_of(tiny_folder), Modes()
    trainer = runs.trainer_for(
        tmp_path, runs.two_merges(), modes, max_steps=9, val_check_interval=2, check_val_every_n_epoch=None
    )
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert modes.training == [True] * 9
    assert modes.validation == [False] * 8


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_held_out_perplexity_is_transformers_own(
    tiny_folder: Path, text: Path, tmp_path: Path, stage: str, precision: str
):
    module = runs.student_of(tiny_folder)
    data = runs.data_for(tiny_folder, text, validation_blocks=5)  # batches of 2, 2 and 1
    trainer = runs.trainer_for(tmp_path, limit_val_batches=1.0, precision=precision)
    module._trainer = trainer
    module.configure_model()
    surgery.apply(module.student, STEP)
    module.history = module.history.append(STEP)
    (logged,) = (trainer.validate if stage == "val" else trainer.test)(module, data, verbose=False)
    assert set(logged) == {f"{stage}/{name}" for name in ("perplexity", "teacher_perplexity", "agreement")}
    assert module.teacher is not None
    for name, model in (("perplexity", module.student), ("teacher_perplexity", module.teacher.model)):
        nats = tokens = 0
        with torch.no_grad():
            for batch in data.val_dataloader():
                count = batch["labels"][:, 1:].numel()
                nats += model(**batch).loss.item() * count
                tokens += count
        assert tokens == 5 * 15
        assert logged[f"{stage}/{name}"] == pytest.approx(
            math.exp(nats / tokens), rel=1e-5 if "32" in precision else 0.01
        )
    assert 0 < logged[f"{stage}/agreement"] < 1


def test_unmerged_student_agrees_with_its_teacher(tiny_folder: Path, text: Path, tmp_path: Path):
    trainer = runs.trainer_for(tmp_path)
    (logged,) = trainer.validate(runs.student_of(tiny_folder), runs.data_for(tiny_folder, text), verbose=False)
    assert logged["val/agreement"] == 1
    assert logged["val/perplexity"] == logged["val/teacher_perplexity"]


def test_predictions_continue_the_first_half_of_a_block(tiny_folder: Path, text: Path, tmp_path: Path):
    module = runs.student_of(tiny_folder)
    data = runs.data_for(tiny_folder, text, validation_blocks=3)
    batches = runs.trainer_for(tmp_path).predict(module, data)
    assert batches is not None
    assert [tuple(batch["prompt"].shape) for batch in batches] == [(2, 8), (1, 8)]  # type: ignore[index, call-overload]
    for batch, given in zip(batches, data.val_dataloader(), strict=True):
        prompt, continuation = batch["prompt"], batch["continuation"]  # type: ignore[index, call-overload]
        assert prompt.equal(given["input_ids"][:, :8])
        assert continuation.shape[0] == len(prompt)
        assert 1 <= continuation.shape[1] <= 64
        with torch.no_grad():
            greedy = module.student(prompt).logits[:, -1].argmax(-1)
        assert continuation[:, 0].equal(greedy)


def test_training_logs_every_term_and_the_depth(tiny_folder: Path, text: Path, tmp_path: Path):
    module = runs.student_of(tiny_folder, objective=[Logits(), Labels(0.5)])
    trainer = runs.trainer_for(tmp_path, at_once(), max_steps=2)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert logged["depth"] == 5
    assert logged["train/loss"] == pytest.approx(logged["train/logits"] + 0.5 * logged["train/labels"], rel=1e-5)


def test_scheduler_without_an_end_refuses_or_runs_without_limit(tiny_folder: Path, text: Path, tmp_path: Path):
    # max_epochs=-1 and max_steps=-1: until somebody stops it, here after two batches
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            trainer.should_stop = trainer.global_step >= 2

    trainer = runs.trainer_for(tmp_path, Stop(), max_steps=-1, max_epochs=-1)
    trainer.fit(runs.student_of(tiny_folder), datamodule=runs.data_for(tiny_folder, text))
    assert trainer.global_step == 2


def test_what_stands_in_for_a_merged_layer_under_ddp_is_not_the_teachers(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcprune.distillation.module.is_ddp", lambda strategy: True)
    module = runs.student_of(tiny_folder, train="merged")
    module.trainer = runs.trainer_for(tiny_folder)
    module.configure_model()
    (stand_in,) = (parameter for parameter in module.student.parameters() if parameter.requires_grad)
    assert module.teacher is not None
    assert stand_in.data_ptr() not in {parameter.data_ptr() for parameter in module.teacher.model.parameters()}
