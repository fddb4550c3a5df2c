"""A run that was stopped around a merge and resumed ends bit for bit like the one that was not."""

import signal
from pathlib import Path

import pytest
import torch

from lcprune.distillation.checkpoint import load_student, read
from lcprune.merging.lineage import MergeHistory
from tests.distillation import runs
from tests.marks import slow
from tests.processes import python

Ending = tuple[dict[str, torch.Tensor], MergeHistory, dict[int, float]]


class Stopped(Exception):
    """The interruption of a run inside this process."""


def stop() -> None:
    raise Stopped


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose student drops attention at random: a wrong random state shows in the next loss."""
    return runs.save_teacher(tmp_path_factory.mktemp("dropping") / "model", dropout=0.3)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of seven batches, so that an epoch ends at the second merge."""
    return runs.write_text(tmp_path_factory.mktemp("short"), words=46)


@pytest.fixture(scope="module")
def whole(dropping: Path, short: Path, tmp_path_factory: pytest.TempPathFactory) -> Ending:
    """How the run ends that nobody stopped."""
    module, losses = runs.resumable(tmp_path_factory.mktemp("whole"), dropping, short)
    return runs.weights_of(module), module.history, losses


def test_run_has_two_merges_several_epochs_and_needs_its_random_state(
    whole: Ending, dropping: Path, short: Path, tmp_path: Path
):
    assert [step.global_step for step in whole[1].steps] == [3, 7]
    assert sorted(whole[2]) == list(range(1, 13))
    data = runs.data_for(dropping, short)
    data.setup()
    assert len(data.train_dataloader()) == 7
    plain, _ = runs.resumable(tmp_path, dropping, short)
    assert runs.equal(runs.weights_of(plain), whole[0])
    (tmp_path / "other").mkdir()
    disturbed, _ = runs.resumable(tmp_path / "other", dropping, short, runs.Interrupt(5, "at", lambda: _draw()))
    assert not runs.equal(runs.weights_of(disturbed), whole[0])


def _draw() -> None:
    torch.rand(1)


def ends_alike(whole: Ending, ending: Ending) -> None:
    assert ending[2] == {step: whole[2][step] for step in ending[2]}
    assert ending[1] == whole[1]
    assert ending[1].digest == whole[1].digest
    assert runs.equal(ending[0], whole[0])


@pytest.mark.parametrize("step", [7, *slow(3)])
@pytest.mark.parametrize("point", runs.POINTS)
def test_interrupted_run_ends_like_the_whole_one(
    whole: Ending, dropping: Path, short: Path, tmp_path: Path, step: int, point: str
):
    with pytest.raises(Stopped):
        runs.resumable(tmp_path, dropping, short, runs.Interrupt(step, point, stop))
    module, losses = runs.resumable(tmp_path, dropping, short, resume=True)
    assert max(losses) == 12
    assert min(losses) == step + (point == "after")
    ends_alike(whole, (runs.weights_of(module), module.history, losses))


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"val_check_interval": 2, "check_val_every_n_epoch": None},
    ],
)
def test_interrupted_run_ends_like_the_whole_one_under(
    dropping: Path, short: Path, tmp_path: Path, settings: dict[str, object]
):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    module, losses = runs.resumable(tmp_path / "whole", dropping, short, **settings)
    whole = runs.weights_of(module), module.history, losses
    with pytest.raises(Stopped):
        runs.resumable(tmp_path / "parts", dropping, short, runs.Interrupt(3, "after", stop), **settings)
    module, losses = runs.resumable(tmp_path / "parts", dropping, short, resume=True, **settings)
    ends_alike(whole, (runs.weights_of(module), module.history, losses))


def test_checkpoints_of_stopped_runs_tell_their_depth(dropping: Path, short: Path, tmp_path: Path):
    depths = {}
    for point in runs.POINTS:
        folder = tmp_path / point
        folder.mkdir()
        with pytest.raises(Stopped):
            runs.resumable(folder, dropping, short, runs.Interrupt(3, point, stop))
        depths[point] = read(folder / "last.ckpt").history.depth
        assert load_student(folder / "last.ckpt")[0].config.num_hidden_layers == depths[point]
    assert depths == {"before": 6, "at": 6, "after": 5}


@pytest.mark.parametrize(
    "points", [("inside",), pytest.param(("before", "inside", "at", "after"), marks=pytest.mark.slow)]
)
def test_run_killed_and_killed_again_around_a_merge_ends_like_the_whole_one(
    whole: Ending, dropping: Path, short: Path, tmp_path: Path, points: tuple[str, ...]
):
    for point in points:
        arguments = (tmp_path, dropping, short, point)
        python("-m", "tests.distillation.killed_run", *arguments, status=-signal.SIGKILL, timeout=300)
        assert read(tmp_path / "last.ckpt").history.depth == (5 if point == "after" else 6)
    module, losses = runs.resumable(tmp_path, dropping, short, resume=True)
    assert sorted(losses) == list(range(4 if points[-1] == "after" else 3, 13))
    ends_alike(whole, (runs.weights_of(module), module.history, losses))
