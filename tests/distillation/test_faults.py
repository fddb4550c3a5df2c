"""A loss or a weight that is no number: the run ends before a weight has seen it, and what was saved is good."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lcprune import DistillationModule, Logits
from lcprune.distillation import objectives
from lcprune.distillation.faults import check_weights
from lcprune.errors import RunError
from tests.distillation import runs


@pytest.fixture
def spoil_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """From the n-th batch on, the loss is what it is times a number."""
    real, count = objectives.objective, [0]

    def spoil(number: int, factor: float) -> None:
        def spoilt(*arguments: object, **named: object) -> dict[str, Tensor]:
            terms = real(*arguments, **named)  # type: ignore[arg-type]
            count[0] += 1
            return {**terms, "loss": terms["loss"] * factor} if count[0] > number else terms

        monkeypatch.setattr(objectives, "objective", spoilt)

    return spoil


def _run(folder: Path, teacher: Path, text: Path, *callbacks: Callback, **settings: object) -> DistillationModule:
    module = runs.student_of(teacher)
    trainer = runs.trainer_for(folder, runs.two_merges(), *callbacks, runs.checkpoints_in(folder), **settings)
    trainer.fit(module, datamodule=runs.data_for(teacher, text))
    return module


def _blocks(teacher: Path, text: Path, batch: int) -> str:
    data = runs.data_for(teacher, text)
    data.setup()
    rows = next(each for index, each in enumerate(data.train_dataloader()) if index == batch)["input_ids"]
    found = [(data.training_blocks() == row).all(1).nonzero().item() for row in rows.int()]
    return ", ".join(map(str, found))


@pytest.mark.parametrize(("factor", "value"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_loss_that_is_no_number_stops_the_run_and_names_its_batch(
    tiny_folder: Path, text: Path, tmp_path: Path, spoil_loss: Callable[[int, float], None], factor: float, value: str
):
    spoil_loss(4, factor)
    blocks = _blocks(tiny_folder, text, 4)
    with pytest.raises(
        RunError, match=rf"optimizer step 5: the loss is {value} in batch 4 of epoch 0 \(training blocks {blocks}\)"
    ):
        _run(tmp_path, tiny_folder, text)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())


def test_loss_that_is_no_number_is_found_among_accumulated_ones(
    tiny_folder: Path, text: Path, tmp_path: Path, spoil_loss: Callable[[int, float], None]
):
    spoil_loss(5, float("nan"))
    with pytest.raises(RunError, match="optimizer step 2: the loss is nan in batch 5"):
        _run(tmp_path, tiny_folder, text, accumulate_grad_batches=4)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


def test_no_weight_has_seen_a_loss_that_is_no_number(
    tiny_folder: Path, text: Path, tmp_path: Path, spoil_loss: Callable[[int, float], None]
):
    spoil_loss(4, float("nan"))
    module = runs.student_of(tiny_folder)
    trainer = runs.trainer_for(tmp_path, runs.two_merges(), runs.checkpoints_in(tmp_path))
    with pytest.raises(RunError):
        trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert runs.equal(runs.weights_of(module), {name: saved[name] for name in runs.weights_of(module)})


class Overflow(Callback):
    """A gradient that is infinite in one step, though its loss is not."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
        if trainer.global_step == 5:
            next(p for p in pl_module.student.parameters() if p.grad is not None).grad[0] = torch.inf


def test_weights_that_are_no_numbers_are_not_saved(tiny_folder: Path, text: Path, tmp_path: Path):
    with pytest.raises(RunError, match=r"after optimizer step 6 .*weight is not finite"):
        _run(tmp_path, tiny_folder, text, Overflow())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())


def test_whole_numbers_are_no_fault():
    packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    check_weights([("packed", packed), ("plain", torch.nn.Parameter(torch.zeros(3)))], trainer)


def test_gradients_that_overflow_under_fp16_are_the_scalers_business(tiny_folder: Path, text: Path, tmp_path: Path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    module = runs.student_of(tiny_folder, objective=[Logits()], lr_scheduler=None)
    weights: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
            weights.append(runs.weights_of(pl_module))

    trainer = runs.trainer_for(tmp_path, Watch(), runs.checkpoints_in(tmp_path), plugins=plugins, max_steps=40)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert scaler.get_scale() < 2.0**40
    assert runs.equal(weights[0], weights[1])  # a step that overflowed was passed over
    assert not runs.equal(weights[0], weights[-1])
    assert all(weight.isfinite().all() for weight in weights[-1].values())
