"""Phases in a run: what is trained when, and that a resumed run goes on in the phase it was in."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lcprune import AtSteps, Boundary, DistillationModule, Drop, FixedPlan, Local, Logits, Phase, ProgressiveCollapse
from lcprune.errors import InputError
from tests.distillation import runs

PHASES = [Phase([Local()], steps=2), Phase([Logits(), Boundary(1.0, final_weight=0.0)], train="after_merge")]


def merges(*steps: int) -> ProgressiveCollapse:
    groups = [[2, 3], [4, 5]][: len(steps)]
    return ProgressiveCollapse(
        AtSteps({step: 5 - place for place, step in enumerate(steps)}),
        planner=FixedPlan(groups),
        operator=Drop("first"),
    )


class Progress(Callback):
    """How far the phase has come before every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
        self.seen.append(pl_module.now.progress)


@pytest.mark.parametrize(
    ("begin", "seen"),
    [
        ("merge", [0, 1 / 2, 0, 1 / 4, 2 / 4, 3 / 4, 0, 1 / 3, 2 / 3]),
        ("run", [step / 9 for step in range(9)]),
    ],
)
def test_a_phase_ends_at_the_next_merge_where_phases_begin_at_merges(
    begin: str, seen: list[float], tiny_folder: Path, text: Path, tmp_path: Path
):
    module = runs.student_of(tiny_folder, phases_begin=begin)
    progress = Progress()
    trainer = runs.trainer_for(tmp_path, merges(2, 6), progress, max_steps=9)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert progress.seen == pytest.approx(seen)


class Moved(Callback):
    """Which layers moved in every optimizer step, by their first teacher layer; and the terms of its loss."""

    def __init__(self) -> None:
        self.layers: dict[int, set[int]] = {}
        self.terms: dict[int, set[str]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
        self.before = runs.weights_of(pl_module.student)

    def on_train_batch_end(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
        moved = {name for name, weight in pl_module.student.named_parameters() if not weight.equal(self.before[name])}
        lineage = pl_module.history.lineage
        self.layers[trainer.global_step] = {
            lineage[int(name.split(".")[2])][0] if ".layers." in name else -1 for name in moved
        }
        self.terms[trainer.global_step] = {
            name.removeprefix("train/") for name in trainer.callback_metrics if name.startswith("train/")
        } - {"loss"}


def test_phases_begin_anew_at_every_merge(tiny_folder: Path, text: Path, tmp_path: Path):
    moved = Moved()
    module = runs.student_of(tiny_folder, objective=None, phases=PHASES)
    trainer = runs.trainer_for(tmp_path, moved, merges(0, 4), max_steps=8, limit_val_batches=0)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert module.history.lineage == ((0,), (1,), (2, 3), (4, 5))
    behind = {2, 4, 5}
    assert moved.layers == {1: {2}, 2: {2}, 3: behind, 4: behind, 5: {2, 4}, 6: {2, 4}, 7: {2, 4}, 8: {2, 4}}


def test_phases_counted_from_the_start_of_the_run_go_on(tiny_folder: Path, text: Path, tmp_path: Path):
    moved = Moved()
    module = runs.student_of(tiny_folder, objective=None, phases=PHASES, phases_begin="run")
    trainer = runs.trainer_for(tmp_path, moved, merges(0, 4), max_steps=6, limit_val_batches=0)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert moved.layers == {1: {2}, 2: {2}, 3: {2, 4, 5}, 4: {2, 4, 5}, 5: {2, 4}, 6: {2, 4}}


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_run_that_resumes_in_a_phase_ends_as_one_that_was_not_stopped(
    tiny_folder: Path, text: Path, tmp_path: Path, killed_at: int
):
    def fit(steps: int, checkpoint: str | None = None, total: int = 8) -> DistillationModule:
        module = runs.student_of(tiny_folder, objective=None, phases=PHASES, lr_scheduler=None)
        trainer = runs.trainer_for(
            tmp_path, merges(0, 4), runs.checkpoints_in(tmp_path), max_steps=total, limit_val_batches=0
        )
        if steps < total:

            class Stop(Callback):
                def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
                    if trainer.global_step == steps:
                        raise KeyboardInterrupt

            trainer.callbacks.append(Stop())  # type: ignore[attr-defined]
            with pytest.raises(SystemExit):
                trainer.fit(module, datamodule=runs.data_for(tiny_folder, text), ckpt_path=checkpoint)
        else:
            trainer.fit(module, datamodule=runs.data_for(tiny_folder, text), ckpt_path=checkpoint)
        return module

    whole = runs.weights_of(fit(8))
    fit(killed_at + 1)
    assert runs.equal(runs.weights_of(fit(8, str(tmp_path / "last.ckpt"))), whole)


def test_prefix_is_run_once_and_only_while_it_is_the_teachers(tiny_folder: Path, text: Path, tmp_path: Path):
    ran: list[int] = []

    class Watch(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
            for index, layer in enumerate(pl_module.student.model.layers):
                layer.register_forward_hook(lambda *_, index=index: ran.append(index))

    module = runs.student_of(tiny_folder, train="after_merge")
    trainer = runs.trainer_for(tmp_path, merges(0), Watch(), max_steps=1, limit_val_batches=0)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert ran == [2, 3, 4]


@pytest.mark.parametrize("train", ["merged", "after_merge"])
def test_teacher_keeps_its_weights_and_the_prefix_its_memory(tiny_folder: Path, text: Path, tmp_path: Path, train: str):
    module = runs.student_of(tiny_folder, train=train)
    module.configure_model()
    assert module.teacher is not None
    before = runs.weights_of(module.teacher.model)
    trainer = runs.trainer_for(tmp_path, merges(0, 2), max_steps=4, limit_val_batches=0)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert runs.equal(runs.weights_of(module.teacher.model), before)
    theirs = {parameter.data_ptr() for parameter in module.teacher.model.parameters()}
    assert all(parameter.data_ptr() in theirs for parameter in module.student.model.layers[:2].parameters())


def test_nothing_to_train_before_the_first_merge_is_said_at_the_start(tiny_folder: Path, text: Path, tmp_path: Path):
    trainer = runs.trainer_for(tmp_path, merges(2), max_steps=4, limit_val_batches=0)
    with pytest.raises(InputError, match="train=merged trains nothing before the first merge"):
        trainer.fit(runs.student_of(tiny_folder, train="merged"), datamodule=runs.data_for(tiny_folder, text))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("settings", [{"activations": "recompute"}, {"compile_layers": True}])
def test_recomputed_activations_and_compiled_layers_train_the_same(
    tiny_folder: Path, text: Path, tmp_path: Path, settings: dict[str, object]
):
    ends = []
    for given in ({}, settings):
        module = runs.student_of(tiny_folder, train="after_merge", optimizer=runs.SGD, lr_scheduler=None, **given)
        trainer = runs.trainer_for(tmp_path, merges(0, 2), max_steps=4, limit_val_batches=0)
        trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
        ends.append(runs.weights_of(module))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)
