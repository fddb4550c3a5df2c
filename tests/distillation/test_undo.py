"""A merge that costs too much leaves no trace, and is tried again later."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lcprune import (
    AtSteps,
    Concat,
    DistillationModule,
    Drop,
    FixedPlan,
    Logits,
    MagnitudeCompensation,
    Phase,
    ProgressiveCollapse,
    RidgeRefit,
)
from lcprune.distillation import merges
from lcprune.distillation.checkpoint import read
from lcprune.distillation.undo import STUDENT
from lcprune.errors import InputError
from lcprune.merging.within import MEASURED
from tests.distillation import runs

Ending = tuple[DistillationModule, dict[str, object]]
REFUSING, KEEPING = (10.0, 20.0), (10.0, 15.0)
"""Calibration perplexities before and after a merge; at most 1.5 times is allowed."""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says beforehand what the calibration perplexities will be."""

    def say(*pairs: tuple[float, float]) -> None:
        values = [value for pair in pairs for value in pair]
        monkeypatch.setattr(merges, "calibration_perplexity", lambda _: values.pop(0))

    return say


@pytest.fixture
def fit(tmp_path: Path, text: Path) -> Callable[..., Ending]:
    """Trains; returns the module and the optimizer's state."""

    def run(
        teacher: Path, *callbacks: Callback, model: dict[str, object] | None = None, resume: bool = False
    ) -> Ending:
        module = runs.student_of(teacher, **(model or {}))
        torch.manual_seed(0)
        trainer = runs.trainer_for(tmp_path, *callbacks, runs.checkpoints_in(tmp_path), max_steps=9)
        checkpoint = str(tmp_path / "last.ckpt") if resume else None
        trainer.fit(module, datamodule=runs.data_for(teacher, text), ckpt_path=checkpoint)
        return module, trainer.optimizers[0].state_dict()

    return run


def limited(depths: dict[int, int], **settings: object) -> ProgressiveCollapse:
    usual = {"planner": FixedPlan([[1, 2], [3, 4]]), "operator": Drop("last"), "max_perplexity_jump": 1.5}
    return ProgressiveCollapse(AtSteps(depths), **usual | settings)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:collapse. the run ends with 6 layers")
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, {}),
        ({}, {"operator": Concat(), "refit": RidgeRefit(layers="after", projections="both")}),
        ({}, {"refit": MagnitudeCompensation()}),
        ({"train": "lora", "objective": [Logits()]}, {"refit": RidgeRefit()}),
    ],
    ids=["drop", "concat and ridge", "magnitude", "lora"],
)
def test_undone_merge_leaves_the_run_as_it_would_be_without(
    fit: Callable[..., Ending],
    measured: Callable[..., None],
    tmp_path: Path,
    model: dict[str, object],
    settings: dict[str, object],
):
    # attention drops out at random: a random number more would show in every later step
    teacher = runs.save_teacher(tmp_path / "teacher", dropout=0.3)
    plain, adam = fit(teacher, model=model)
    measured(REFUSING)
    module, state = fit(teacher, limited({3: 4}, **settings), model=model)
    assert module.standing.refused == (3,)
    assert module.history == plain.history
    assert module.student.config.to_dict() == plain.student.config.to_dict()
    assert runs.equal(runs.weights_of(module), runs.weights_of(plain))
    torch.testing.assert_close(state, adam, rtol=0, atol=0)


def test_undone_merge_is_tried_again_at_the_next_milestone_and_the_run_says_what_is_missing(
    fit: Callable[..., Ending], measured: Callable[..., None], tiny_folder: Path
):
    measured(REFUSING, KEEPING)
    with pytest.warns(
        UserWarning, match="ends with 5 layers, its schedule with 4; the merges tried at step 3 cost more"
    ):
        module, _ = fit(tiny_folder, limited({3: 5, 7: 4}))
    assert [(step.global_step, step.group) for step in module.history.steps] == [(7, (1, 2))]
    assert module.history.steps[0].measured[STUDENT] == 10.0
    assert module.history.steps[0].measured[MEASURED] == 15.0


class Stopped(Exception):
    """The interruption of a run inside this process."""


def stop() -> None:
    raise Stopped


@pytest.mark.filterwarnings("ignore:collapse. the run ends with 5 layers")
@pytest.mark.parametrize("point", runs.POINTS)
def test_run_that_resumes_around_an_undone_merge_ends_like_the_whole_one(
    fit: Callable[..., Ending], measured: Callable[..., None], tiny_folder: Path, tmp_path: Path, point: str
):
    measured(REFUSING, KEEPING)
    whole, _ = fit(tiny_folder, limited({3: 5, 7: 4}))
    measured(REFUSING)
    with pytest.raises(Stopped):
        fit(tiny_folder, runs.Interrupt(3, point, stop), limited({3: 5, 7: 4}))
    undone = tuple(read(tmp_path / "last.ckpt").standing["refused"])  # type: ignore[arg-type]
    assert undone == ((3,) if point == "after" else ())
    measured(*([KEEPING] if undone else [REFUSING, KEEPING]))
    module, _ = fit(tiny_folder, limited({3: 5, 7: 4}), resume=True)
    assert module.history == whole.history
    assert runs.equal(runs.weights_of(module), runs.weights_of(whole))


def test_what_is_no_number_is_too_much(fit: Callable[..., Ending], measured: Callable[..., None], tiny_folder: Path):
    measured((10.0, float("nan")))
    with pytest.warns(UserWarning, match="the run ends with 6 layers"):
        module, _ = fit(tiny_folder, limited({3: 5}))
    assert module.history.depth == 6


def test_limit_is_held_against_the_student_before_the_merge_on_calibration_text(
    fit: Callable[..., Ending], tiny_folder: Path
):
    module, _ = fit(tiny_folder, limited({3: 5, 7: 4}, max_perplexity_jump=1e9))
    first, second = (step.measured for step in module.history.steps)
    assert first[MEASURED] != first[STUDENT]
    assert second[STUDENT] != first[MEASURED]  # trained meanwhile


@pytest.mark.parametrize("jump", [0.5, float("inf"), float("nan")])
def test_limit_that_is_none_is_refused(jump: float):
    with pytest.raises(InputError, match="max_perplexity_jump="):
        limited({3: 5}, max_perplexity_jump=jump)


def test_phase_that_an_undone_merge_leaves_with_nothing_to_train_says_why(
    tiny_folder: Path, fit: Callable[..., Ending], measured: Callable[..., None]
):
    measured(REFUSING)
    phases = [Phase([Logits()], steps=4), Phase([Logits()], train="merged")]
    collapse = ProgressiveCollapse(AtSteps({3: 5}), planner=FixedPlan([[1, 2]]), max_perplexity_jump=1.5)
    with pytest.raises(InputError, match=r"nothing to train, because the merge at step 3 is undone: raise"):
        fit(tiny_folder, collapse, model={"objective": None, "phases": phases, "phases_begin": "run"})
