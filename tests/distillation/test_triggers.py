"""Schedules that look at tokens or validations: literal decisions, then runs, whole and interrupted."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lcprune import (
    AtSteps,
    ByTokens,
    DistillationModule,
    Drop,
    Evenly,
    FixedPlan,
    Local,
    Logits,
    Phase,
    ProgressiveCollapse,
    Schedule,
    WhenRecovered,
)
from lcprune.distillation.checkpoint import read
from lcprune.distillation.schedules import Facts
from lcprune.distillation.standing import BEFORE
from lcprune.errors import InputError
from tests.distillation import runs
from tests.marks import slow

THREE = AtSteps({10: 28, 20: 26, 30: 24})


@pytest.mark.parametrize(
    ("before", "tokens", "due"),
    [(-1, 0, None), (0, 9, None), (9, 10, 28), (9, 14, 28), (10, 14, None), (9, 20, 26), (21, 40, 24), (30, 99, None)],
)
def test_tokens_are_due_in_the_step_that_passes_them_and_in_no_other(before: int, tokens: int, due: int | None):
    assert ByTokens(THREE).due(Facts(7, begun=30, depth=30, tokens=tokens, tokens_before=before)) == due


def test_merge_before_the_first_token_has_a_known_step_and_later_ones_have_none():
    assert ByTokens(Evenly(24, merges=2, last=900)).deadlines(30) == ((0, 27), (math.inf, 24))


def _merged(step: int, *since: float, depth: int = 28, **facts: object) -> Facts:
    return Facts(step, begun=30, depth=depth, **{"merged": True, "before": 10.0, "since": since} | facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "due"),
    [
        (_merged(12, 11.0), None),
        (_merged(12, 11.0, 10.5), 26),
        (_merged(12, 10.4, 10.6), None),  # it has got worse again
        (_merged(12), None),
        (_merged(20, 99.0), 26),  # the deadline
        (_merged(20, 10.0, depth=26), 24),  # ahead of the deadline, and recovered again
        (_merged(20, 12.0, depth=26), None),
        (_merged(25, 10.0, depth=24), None),  # nothing left
        (_merged(12, 10.0, before=None), None),
        (_merged(9, 10.0, merged=False, before=None, depth=30), None),  # nothing to recover from
        (_merged(10, merged=False, before=None, depth=30), 28),
    ],
)
def test_recovery_is_being_back_within_a_fraction_of_the_perplexity_before_the_merge(facts: Facts, due: int | None):
    assert WhenRecovered(THREE, within=0.05).due(facts) == due


@pytest.mark.parametrize(
    ("since", "due"),
    [
        ((20.0, 19.9, 19.9), 26),  # each less than 1 % below the best
        ((20.0, 19.9, 19.7), None),  # 1.5 % below 20 all in all
        ((20.0, 18.0, 17.9), None),
        ((20.0, 18.0, 17.9, 18.5), 26),
        ((20.0,), None),
    ],
)
def test_plateau_is_so_many_validations_in_a_row_without_a_gain(since: tuple[float, ...], due: int | None):
    assert WhenRecovered(THREE, within=None, patience=2).due(_merged(12, *since)) == due


def test_after_a_merge_was_undone_every_later_milestone_takes_one_portion():
    asked = {step: THREE.due(Facts(step, begun=30, depth=30, refused=step > 10)) for step in (10, 20, 30)}
    assert asked == {10: 28, 20: 28, 30: 28}
    assert THREE.due(Facts(30, begun=30, depth=28, refused=True)) == 26


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WhenRecovered(THREE, within=None), "leave nothing to recover by"),
        (lambda: WhenRecovered(THREE, within=-0.1), r"within=-0\.1 must be a fraction of 0 or more"),
        (lambda: WhenRecovered(THREE, patience=0), "patience=0 must be 1 or more"),
        (lambda: WhenRecovered(THREE, min_gain=1.0), r"min_gain=1\.0 must lie in \[0, 1\)"),
        (lambda: ByTokens(AtSteps({5: 20, 9: 21})).check(30, 100), "depth 21 at token 9 does not go below 20"),
        (lambda: ByTokens(AtSteps({-1: 20})).check(30, 100), r"tokens \[-1\] must grow from 0 on"),
        (lambda: WhenRecovered(THREE).check(30, 30), r"step 30 lies at or behind trainer\.max_steps=30"),
    ],
)
def test_what_no_run_could_do_is_refused_in_one_sentence(make: Callable[[], object], said: str):
    with pytest.raises(InputError, match=said):
        make()


def test_tokens_may_be_more_than_steps():
    ByTokens(AtSteps({10**9: 20})).check(30, 100)


# ---- runs

PLAN = FixedPlan([[1, 2], [3, 4]])
RECOVERING = WhenRecovered(AtSteps({3: 5, 11: 4}), within=None, patience=2, min_gain=0.99)
"""No validation ever is a gain: validated at 4, 6 and 8, the student merges at 9."""
EVERY_TWO = {"val_check_interval": 2, "check_val_every_n_epoch": None}


def collapse(schedule: Schedule, **settings: object) -> ProgressiveCollapse:
    """Six layers, two pairs."""
    return ProgressiveCollapse(schedule, planner=PLAN, operator=Drop("last"), **settings)  # type: ignore[arg-type]


Fit = Callable[..., tuple[DistillationModule, Trainer]]


@pytest.fixture
def fit(tiny_folder: Path, text: Path, tmp_path: Path) -> Fit:
    """Trains with a schedule; everything else is the trainer's."""

    def run(
        schedule: Schedule,
        *callbacks: Callback,
        module: DistillationModule | None = None,
        data: dict[str, object] | None = None,
        resume: bool = False,
        **settings: object,
    ) -> tuple[DistillationModule, Trainer]:
        module = runs.student_of(tiny_folder) if module is None else module
        trainer = runs.trainer_for(tmp_path, *callbacks, collapse(schedule), runs.checkpoints_in(tmp_path), **settings)
        checkpoint = str(tmp_path / "last.ckpt") if resume else None
        trainer.fit(module, datamodule=runs.data_for(tiny_folder, text, **data or {}), ckpt_path=checkpoint)
        return module, trainer

    return run


def merged_at(module: DistillationModule) -> list[int | None]:
    return [step.global_step for step in module.history.steps]


@pytest.mark.parametrize(("batch_size", "accumulate", "steps"), [(2, 1, [3, 7]), (1, 1, [6, 14]), (1, 2, [3, 7])])
def test_as_many_tokens_are_read_before_a_merge_whatever_the_batch(
    fit: Fit, batch_size: int, accumulate: int, steps: list[int]
):
    # blocks of 16: 32 tokens a step with two, 96 = 3 * 32 and 224 = 7 * 32
    schedule = ByTokens(AtSteps({96: 5, 224: 4}))
    settings = {"accumulate_grad_batches": accumulate, "max_steps": 16}
    module, _ = fit(schedule, data={"batch_size": batch_size}, **settings)
    assert merged_at(module) == steps


class Stopped(Exception):
    """The interruption of a run inside this process."""


def stop() -> None:
    raise Stopped


def test_tokens_are_counted_on_by_a_run_that_resumes(fit: Fit, tmp_path: Path):
    schedule = ByTokens(AtSteps({96: 5, 224: 4}))
    with pytest.raises(Stopped):
        fit(schedule, runs.Interrupt(5, "after", stop))
    assert read(tmp_path / "last.ckpt").standing["counted"] == 5 * 32
    module, _ = fit(schedule, resume=True)
    assert merged_at(module) == [3, 7]


@pytest.mark.filterwarnings("ignore:collapse. the run ends with 6 layers")
def test_tokens_that_the_run_will_not_read_are_told_at_its_first_step(fit: Fit):
    with pytest.warns(UserWarning, match=r"about 384 tokens.*token 384"):
        fit(ByTokens(AtSteps({384: 5})), max_steps=12)


@pytest.mark.filterwarnings("ignore:collapse")
def test_merge_behind_the_last_step_is_left_to_the_run_that_goes_on(fit: Fit, tiny_folder: Path):
    def steady() -> DistillationModule:
        return runs.student_of(tiny_folder, lr_scheduler=None)  # a cosine would end with the shorter run

    schedule = ByTokens(AtSteps({96: 5, 224: 4}))
    module, _ = fit(schedule, module=steady(), max_steps=7)
    assert merged_at(module) == [3]
    module, _ = fit(schedule, module=steady(), resume=True)
    assert merged_at(module) == [3, 7]
    whole, _ = fit(schedule, module=steady())
    assert runs.equal(runs.weights_of(module), runs.weights_of(whole))


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (WhenRecovered(AtSteps({3: 5, 11: 4}), within=1e9), [3, 5]),
        (RECOVERING, [3, 9]),
        (WhenRecovered(AtSteps({3: 5, 11: 4}), within=None, patience=100), [3, 11]),
    ],
)
def test_recovered_student_merges_at_the_step_behind_the_validation_that_says_so(
    fit: Fit, schedule: WhenRecovered, steps: list[int]
):
    module, _ = fit(schedule, **EVERY_TWO)
    assert merged_at(module) == steps
    assert module.history.depth == 4


def test_perplexity_before_a_merge_is_that_of_the_unmerged_student(fit: Fit, tiny_folder: Path):
    still = runs.student_of(tiny_folder, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), lr_scheduler=None)
    module, _ = fit(WhenRecovered(AtSteps({2: 5})), module=still, max_steps=3, **EVERY_TWO)
    measured = module.history.steps[0].measured
    assert measured[BEFORE] == pytest.approx(measured["val/teacher_perplexity"], rel=1e-6)
    assert measured["val/perplexity"] != measured[BEFORE]


def test_validations_before_the_last_phase_do_not_count(fit: Fit, tiny_folder: Path):
    phases = [Phase([Local()], steps=5), Phase([Logits()])]
    module = runs.student_of(tiny_folder, objective=None, phases=phases)
    # whatever the validation says is recovery, and the first in the last phase is the one after step 6
    schedule = WhenRecovered(AtSteps({0: 5, 11: 4}), within=1e9)
    module, _ = fit(schedule, module=module, max_steps=18, **EVERY_TWO)
    assert merged_at(module) == [0, 7]


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillationModule:
    """The run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    module = runs.student_of(tiny_folder)
    trainer = runs.trainer_for(folder, collapse(RECOVERING), **EVERY_TWO)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    return module


@pytest.mark.parametrize(
    ("step", "point"), [(8, "before"), (8, "at"), (8, "after"), *slow((6, "after"), (9, "at"), (9, "after"))]
)
def test_interrupted_run_decides_as_the_whole_one(fit: Fit, whole: DistillationModule, step: int, point: str):
    with pytest.raises(Stopped):
        fit(RECOVERING, runs.Interrupt(step, point, stop), **EVERY_TWO)
    module, _ = fit(RECOVERING, resume=True, **EVERY_TWO)
    assert merged_at(module) == [3, 9]
    assert module.history == whole.history
    assert runs.equal(runs.weights_of(module), runs.weights_of(whole))


class StopInValidation(Callback):
    """Dies before the validation behind a step has said anything: the checkpoint of that step is there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            stop()


def test_validation_that_was_not_finished_is_made_up_for(fit: Fit, whole: DistillationModule, tmp_path: Path):
    with pytest.raises(Stopped):
        fit(RECOVERING, StopInValidation(8), **EVERY_TWO)
    assert read(tmp_path / "last.ckpt").standing["pending"] is True
    module, _ = fit(RECOVERING, resume=True, **EVERY_TWO)
    assert module.history == whole.history
    assert runs.equal(runs.weights_of(module), runs.weights_of(whole))


def test_schedule_by_validation_without_validation_is_refused(fit: Fit):
    with pytest.raises(InputError, match=r"limit_val_batches=0 allows none"):
        fit(RECOVERING, limit_val_batches=0)


def test_checkpoint_that_has_counted_no_tokens_is_refused(fit: Fit, tmp_path: Path):
    fit(AtSteps({3: 5}), max_steps=4)
    path = tmp_path / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["lcprune"]["standing"]
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="has counted no tokens"):
        fit(ByTokens(AtSteps({96: 5, 224: 4})), resume=True)
