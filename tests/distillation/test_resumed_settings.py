"""What a recipe says when a run goes on: settings of optimizer, schedule and training other than the checkpoint's."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from lcprune import AtSteps, Drop, FixedPlan, ProgressiveCollapse
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.optim import RewarmingCosine
from tests.distillation import runs

Run = Callable[..., list[dict[str, object]]]


class Groups(Callback):
    """The settings that every optimizer step is made with."""

    def __init__(self) -> None:
        self.seen: list[dict[str, object]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: DistillationModule, optimizer: AdamW) -> None:
        group = optimizer.param_groups[0]
        self.seen.append({name: value for name, value in group.items() if name != "params"})


@pytest.fixture
def run(tiny_folder: Path, text: Path, tmp_path: Path) -> Run:
    """Three steps, or from their checkpoint to six."""

    def fit(goes_on: bool = False, **settings: object) -> list[dict[str, object]]:
        groups, module = Groups(), runs.student_of(tiny_folder, **settings)
        callbacks = (groups, runs.checkpoints_in(tmp_path))
        trainer = runs.trainer_for(tmp_path, *callbacks, max_steps=6 if goes_on else 3)
        path = str(tmp_path / "last.ckpt") if goes_on else None
        trainer.fit(module, datamodule=runs.data_for(tiny_folder, text), ckpt_path=path)
        return groups.seen

    return fit


def test_other_learning_rate_counts_from_the_resume_on(run: Run, caplog: pytest.LogCaptureFixture):
    run(optimizer=partial(AdamW, lr=1e-2), lr_scheduler=None)
    with caplog.at_level(logging.INFO):
        seen = run(goes_on=True, optimizer=partial(AdamW, lr=1e-5, weight_decay=0.1), lr_scheduler=None)
    assert [(group["lr"], group["weight_decay"]) for group in seen] == [(1e-5, 0.1)] * 3
    assert "from here on: lr 1e-05 (was 0.01), weight_decay 0.1 (was 0.01)" in caplog.text


def test_other_peak_and_curve_count_from_the_resume_on(run: Run, caplog: pytest.LogCaptureFixture):
    curve = partial(RewarmingCosine, warmup_steps=2, floor=0.5, total_steps=10)
    run(optimizer=partial(AdamW, lr=1e-2), lr_scheduler=curve)
    other = partial(RewarmingCosine, warmup_steps=2, floor=0.1, total_steps=10)
    with caplog.at_level(logging.INFO):
        seen = run(goes_on=True, optimizer=partial(AdamW, lr=1e-4), lr_scheduler=other)
    probe = AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    wanted = other(probe).curve
    assert [group["lr"] for group in seen] == pytest.approx([1e-4 * wanted(step) for step in (3, 4, 5)])
    assert "lr [0.0001] (was [0.01]), floor 0.1 (was 0.5)" in caplog.text


def test_prefix_that_was_trained_before_is_not_the_teachers_where_only_layers_behind_it_are_trained_now(
    tiny_folder: Path, text: Path, tmp_path: Path
):
    data = runs.data_for(tiny_folder, text)
    collapse = ProgressiveCollapse(AtSteps({0: 5}), planner=FixedPlan([[3, 4]]), operator=Drop("last"))
    trainer = runs.trainer_for(tmp_path, collapse, max_steps=2)
    trainer.fit(runs.student_of(tiny_folder, train="all"), datamodule=data)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    module = runs.student_of(tiny_folder, train="after_merge")
    runs.trainer_for(tmp_path).validate(module, data, ckpt_path=str(tmp_path / "all.ckpt"), verbose=False)
    assert module.teacher is not None
    mine, original = (model.model.layers[0].mlp.down_proj.weight for model in (module.student, module.teacher.model))
    assert not torch.equal(mine, original)
    assert not module._prefix_is_original


@pytest.mark.parametrize("schedule", [runs.COSINE, partial(OneCycleLR, max_lr=1e-2, total_steps=9), None])
def test_nothing_is_said_where_nothing_was_changed(schedule: object, run: Run, caplog: pytest.LogCaptureFixture):
    run(lr_scheduler=schedule)
    with caplog.at_level(logging.INFO):
        run(goes_on=True, lr_scheduler=schedule)
    assert "from here on" not in caplog.text


def test_scheduler_of_torch_goes_on_as_it_was_and_that_is_said(run: Run):
    run(optimizer=partial(AdamW, lr=1e-2), lr_scheduler=partial(StepLR, step_size=2))
    with pytest.warns(UserWarning, match=r"learning rate 0\.01 stays and 0\.001 is not used, because StepLR"):
        seen = run(goes_on=True, optimizer=partial(AdamW, lr=1e-3), lr_scheduler=partial(StepLR, step_size=2))
    assert [group["lr"] for group in seen] == pytest.approx([1e-3, 1e-4, 1e-4])
