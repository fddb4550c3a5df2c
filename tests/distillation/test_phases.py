"""Phases follow one another by the step alone, and begin anew where they are told to."""

import pytest

from lcprune.distillation.beforehand import check_merges, check_precision, warn_of_phases
from lcprune.distillation.levels import Labels, Local, Logits
from lcprune.distillation.phases import Phase, check, now
from lcprune.distillation.teacher import DtypeName
from lcprune.distillation.trained import Trained
from lcprune.errors import InputError

FIRST, SECOND, LAST = Phase([Logits()], steps=4), Phase([Labels()], steps=2), Phase([Logits(), Labels()])
PHASES = (FIRST, SECOND, LAST)


@pytest.mark.parametrize(
    ("step", "phase", "progress"),
    [(0, FIRST, 0), (3, FIRST, 0.75), (4, SECOND, 0), (5, SECOND, 0.5), (6, LAST, 0), (9, LAST, 0.75), (99, LAST, 1)],
)
def test_phases_follow_one_another_by_the_step(step: int, phase: Phase, progress: float):
    found = now(PHASES, step, end=10)
    assert (found.phase, found.progress) == (phase, progress)


def test_phases_are_counted_from_where_they_began():
    assert now(PHASES, 7, begun=7, end=20) == now(PHASES, 0, end=13)
    assert now(PHASES, 12, begun=7, end=20).phase == SECOND


def test_phase_without_a_known_end_makes_no_progress():
    assert now(PHASES, 1000).progress == 0
    assert now((LAST,), 1000).progress == 0


@pytest.mark.parametrize(
    ("phases", "message"),
    [([], "at least one"), ([FIRST, SECOND], r"steps=\[4, 2\]"), ([LAST, LAST], r"steps=\[None, None\]")],
)
def test_phases_that_leave_a_gap_are_refused(phases: list[Phase], message: str):
    with pytest.raises(InputError, match=message):
        check(phases)


@pytest.mark.parametrize(
    ("settings", "message"), [({"steps": 0}, "steps=0"), ({"train": "head"}, "train='head' must be one of all, layers")]
)
def test_phase_that_cannot_be_is_refused(settings: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        Phase([Logits()], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("train", ["all", "layers", "after_merge", "lora"])
def test_local_alone_with_anything_else_to_train_is_refused(train: Trained):
    with pytest.raises(InputError, match=f"train='{train}' beside Local alone"):
        Phase([Local()], train=train)
    assert Phase([Local()], train="merged").trained("all") == "merged"
    assert Phase([Local(), Logits()], train=train).trained("merged") == train


def test_last_phase_that_never_begins_is_said():
    with pytest.warns(UserWarning, match=r"the last one begins at step 16, and the run ends after 16: it is never"):
        warn_of_phases(PHASES, 10, 16)
    warn_of_phases(PHASES, 10, 17)
    warn_of_phases((LAST,), 0, 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_are_not_trained_under_a_loss_scale_but_adapters_on_them_are(dtype: DtypeName):
    phases = [Phase([Logits()])]
    with pytest.raises(InputError, match=rf"model\.dtype={dtype} .* set model\.dtype: float32"):
        check_precision("16-mixed", dtype, phases, "all")
    check_precision("16-mixed", dtype, phases, "lora")
    check_precision("16-mixed", "float32", phases, "all")


def test_double_precision_is_refused_where_layers_merge_and_only_there():
    check_precision("64-true", "float32", [Phase([Logits()])], "all")
    check_merges("32-true")
    with pytest.raises(InputError, match=r"trainer\.precision=64-true"):
        check_merges("64-true")
