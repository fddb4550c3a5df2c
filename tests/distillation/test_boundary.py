"""A checkpoint from the middle of a step says where its weights belong: the step is begun anew."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lcprune import AtSteps, DistillationModule, Drop, FixedPlan, ProgressiveCollapse
from lcprune.distillation import optim
from lcprune.distillation.boundary import StepBoundary, before_batch
from lcprune.distillation.checkpoint import read
from lcprune.distillation.standing import Standing
from lcprune.errors import RunError
from tests.distillation import runs
from tests.marks import slow

WINDOW = 2
STEPS = 7
"""Of runs with two merges, at 3 and at 5, and an epoch that ends after step 4 with a window of one."""


class Stopped(Exception):
    """The interruption of a run inside this process."""


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_teacher(tmp_path_factory.mktemp("dropping") / "model", dropout=0.3)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven batches."""
    return runs.write_text(tmp_path_factory.mktemp("short"), words=46)


class At(Callback):
    """Calls `act` at one micro-batch, by its number in the whole run, in one hook."""

    def __init__(self, number: int, hook: str, act: Callable[[Trainer], None]) -> None:
        self.number, self.act = number, act
        setattr(self, hook, self._maybe)

    def _maybe(self, trainer: Trainer, *_: object) -> None:
        if trainer.fit_loop.total_batch_idx == self.number:
            self.act(trainer)


def _merges() -> ProgressiveCollapse:
    return ProgressiveCollapse(AtSteps({3: 5, 5: 4}), planner=FixedPlan([[1, 2], [3, 4]]), operator=Drop("last"))


def _fit(
    folder: Path,
    teacher: Path,
    text: Path,
    *callbacks: Callback,
    resume: Path | None = None,
    stream: Mapping[str, object] = MappingProxyType({}),
    **settings: object,
) -> DistillationModule:
    module = runs.student_of(teacher)
    torch.manual_seed(123 if resume else 0)
    usual = {"accumulate_grad_batches": WINDOW, "max_steps": STEPS}
    trainer = runs.trainer_for(folder, _merges(), *callbacks, **(usual | settings))
    data = runs.data_for(teacher, text, validation_blocks=1, **stream)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def whole(dropping: Path, short: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillationModule:
    return _fit(tmp_path_factory.mktemp("whole"), dropping, short)


def _stop_with(path: Path) -> Callable[[Trainer], None]:
    def act(trainer: Trainer) -> None:
        trainer.save_checkpoint(path)
        raise Stopped

    return act


def _saving_on_exception(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "exception", save_top_k=0, save_on_exception=True)


# Micro-batches 0 and 1 are step 1; 6 is step 4 and the end of the epoch; 7 and 8 are step 5, with the second merge.
@pytest.mark.parametrize("number", [0, 7, *slow(2, 4, 9)])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_before_backward"])
def test_checkpoint_between_micro_batches_resumes_exactly(
    whole: DistillationModule, dropping: Path, short: Path, tmp_path: Path, number: int, hook: str
):
    with pytest.raises(Stopped):
        _fit(tmp_path, dropping, short, At(number, hook, _stop_with(tmp_path / "middle.ckpt")))
    module = _fit(tmp_path, dropping, short, resume=tmp_path / "middle.ckpt")
    assert module.history == whole.history
    assert runs.equal(runs.weights_of(module), runs.weights_of(whole))


@pytest.mark.parametrize("number", [3, 6, 8])
def test_checkpoint_after_an_exception_in_a_step_resumes_exactly(
    whole: DistillationModule, dropping: Path, short: Path, tmp_path: Path, number: int
):
    def stop(trainer: Trainer) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        _fit(tmp_path, dropping, short, At(number, "on_before_backward", stop), _saving_on_exception(tmp_path))
    saving = _saving_on_exception(tmp_path)
    module = _fit(tmp_path, dropping, short, saving, resume=tmp_path / "exception.ckpt")
    assert runs.equal(runs.weights_of(module), runs.weights_of(whole))


def test_checkpoints_of_a_resumed_run_resume_exactly(
    whole: DistillationModule, dropping: Path, short: Path, tmp_path: Path
):
    """Lightning writes one at the first micro-batch after a resume."""

    def stop(trainer: Trainer) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        _fit(tmp_path, dropping, short, At(4, "on_before_backward", stop), runs.checkpoints_in(tmp_path))
    for number in (5, 7):
        stopping = At(number, "on_before_backward", stop)
        with pytest.raises(Stopped):
            _fit(tmp_path, dropping, short, stopping, runs.checkpoints_in(tmp_path), resume=tmp_path / "last.ckpt")
    module = _fit(tmp_path, dropping, short, runs.checkpoints_in(tmp_path), resume=tmp_path / "last.ckpt")
    assert runs.equal(runs.weights_of(module), runs.weights_of(whole))


def test_checkpoint_of_a_stream_between_micro_batches_resumes_exactly(dropping: Path, tmp_path: Path):
    stream = {"streaming": True, "streaming_window": 4}
    words = runs.write_text(tmp_path, words=240).read_text(encoding="utf-8").split()
    text = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": " ".join(words[at : at + 12])}) for at in range(0, len(words), 12)]
    text.write_text("\n".join(rows), encoding="utf-8")
    whole = _fit(tmp_path / "whole", dropping, text, stream=stream)
    stopping = At(4, "on_before_backward", _stop_with(tmp_path / "middle.ckpt"))
    with pytest.raises(Stopped):
        _fit(tmp_path, dropping, text, stopping, stream=stream)
    module = _fit(tmp_path, dropping, text, resume=tmp_path / "middle.ckpt", stream=stream)
    assert runs.equal(runs.weights_of(module), runs.weights_of(whole))


def test_half_merged_student_is_not_saved(dropping: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(optim, "carry_over", fail)
    saving = runs.checkpoints_in(tmp_path)
    saving.save_on_exception = True
    with pytest.raises(RunError, match="A merge was changing the student's weights") as caught:
        _fit(tmp_path, dropping, short, saving)
    assert isinstance(caught.value.__context__, Stopped)
    assert read(tmp_path / "last.ckpt").history.depth == 6


def test_half_stepped_student_is_not_saved(dropping: Path, short: Path, tmp_path: Path):
    class Breaks(torch.optim.SGD):
        def step(self, closure: Callable[[], torch.Tensor] | None = None) -> None:
            assert closure is not None
            closure()
            if trainer.global_step == 1:
                raise Stopped

    saving = _saving_on_exception(tmp_path)
    module = runs.student_of(dropping, optimizer=lambda parameters: Breaks(parameters, lr=0.1), lr_scheduler=None)
    trainer = runs.trainer_for(tmp_path, saving)
    with pytest.raises(RunError, match="The optimizer was changing"):
        trainer.fit(module, datamodule=runs.data_for(dropping, short))
    assert not any(tmp_path.glob("*.ckpt"))


def test_between_steps_nothing_is_rewound():
    boundary, checkpoint = StepBoundary(), {"loops": {"fit_loop": "as it is"}}
    boundary.rewind(checkpoint, 3)
    assert checkpoint == {"loops": {"fit_loop": "as it is"}}


@pytest.mark.parametrize("position", [{"epoch": 1, "batch": 4, "batches": 7}, {"round": 0, "row": 9, "batch": 4}])
def test_state_before_a_batch_is_one_batch_back(position: dict[str, int]):
    counts = {"ready": 4, "started": 3, "processed": 3, "completed": 3}
    loops = {
        "state_dict": {"combined_loader": [position, {"of": "another kind"}]},
        "epoch_loop.batch_progress": {"total": counts, "current": counts, "is_last_batch": True},
    }
    back = before_batch(loops)
    assert back["epoch_loop.batch_progress"] == {
        "total": {**counts, "ready": 3},
        "current": {**counts, "ready": 3},
        "is_last_batch": False,
    }
    assert back["state_dict"] == {"combined_loader": [{**position, "batch": 3}, {"of": "another kind"}]}
    assert position["batch"] == 4


def test_validation_inside_a_step_comes_again_with_the_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lcprune.distillation.boundary.before_batch", lambda loops: loops)
    boundary, standing = StepBoundary(), Standing(since=(3.0,))
    trainer = SimpleNamespace(global_step=4, fit_loop=SimpleNamespace(state_dict=dict))
    boundary.begin(trainer, standing)  # type: ignore[arg-type]
    standing.validated(2.0)
    assert boundary.standing(standing.to_dict(), 4)["since"] == (3.0,)
    assert boundary.standing(standing.to_dict(), 5)["since"] == (3.0, 2.0)
