"""Several methods over one run."""

from pathlib import Path

import pytest

from lcprune import (
    AtSteps,
    BlockInfluence,
    Drop,
    FixedPlan,
    Magnitude,
    OneShotRanking,
    ProgressiveCollapse,
    RidgeRefit,
    WeightedAverage,
)
from lcprune.distillation import stages
from lcprune.distillation.stages import Method, Stage
from lcprune.errors import InputError
from tests.distillation import runs

USUAL = Method(OneShotRanking(), Drop(), None)
STAGES = [Stage(26, operator=WeightedAverage()), Stage(22, planner=OneShotRanking(Magnitude()), refit=RidgeRefit())]


@pytest.mark.parametrize(
    ("target", "made_with"),
    [
        (28, Method(OneShotRanking(), WeightedAverage(), None)),
        (26, Method(OneShotRanking(), WeightedAverage(), None)),
        (25, Method(OneShotRanking(Magnitude()), Drop(), RidgeRefit())),
        (22, Method(OneShotRanking(Magnitude()), Drop(), RidgeRefit())),
        (21, USUAL),
    ],
)
def test_stage_reaches_down_to_its_depth_and_says_what_is_different(target: int, made_with: Method):
    assert stages.method(STAGES, USUAL, target) == made_with


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([Stage(22), Stage(26)], r"until_depth=\[22, 26\] must fall"),
        ([Stage(26), Stage(26)], r"until_depth=\[26, 26\] must fall"),
        ([Stage(29)], "no merge is made in the stage until_depth=29, the schedule merges down to 28, 26, 22"),
        ([Stage(28), Stage(27)], "no merge is made in the stage until_depth=27"),
    ],
)
def test_stage_in_which_nothing_happens_is_refused(given: list[Stage], said: str):
    with pytest.raises(InputError, match=said):
        stages.check(given, [28, 26, 22])


def test_history_says_what_every_merge_was_made_with(tiny_folder: Path, text: Path, tmp_path: Path):
    collapse = ProgressiveCollapse(
        AtSteps({2: 5, 4: 4, 6: 3}),
        planner=OneShotRanking(BlockInfluence()),
        stages=[
            Stage(5, planner=FixedPlan([[1, 2]]), operator=WeightedAverage()),
            Stage(4, planner=FixedPlan([[4, 5]]), refit=RidgeRefit()),
        ],
    )
    module = runs.student_of(tiny_folder)
    runs.trainer_for(tmp_path, collapse, max_steps=8).fit(module, datamodule=runs.data_for(tiny_folder, text))
    made = [
        (str(step.operator["class_path"]).rpartition(".")[2], step.refit is not None) for step in module.history.steps
    ]
    assert made == [("WeightedAverage", False), ("Drop", True), ("Drop", False)]
    assert module.history.steps[0].group == (1, 2)
    assert module.history.steps[1].group == (3, 4)


def test_planner_of_a_stage_is_checked_against_its_own_depths(tiny_folder: Path, text: Path, tmp_path: Path):
    collapse = ProgressiveCollapse(AtSteps({2: 5, 4: 4}), stages=[Stage(5, planner=FixedPlan([[8, 9]]))])
    with pytest.raises(InputError, match="leaves 6 of the 6 layers"):
        runs.trainer_for(tmp_path, collapse).fit(
            runs.student_of(tiny_folder), datamodule=runs.data_for(tiny_folder, text)
        )
