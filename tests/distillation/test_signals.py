"""A signal is answered between two optimizer steps, with a checkpoint from which the run goes on exactly."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lcprune import DistillationModule
from lcprune.distillation import optim
from lcprune.distillation.checkpoint import read
from lcprune.distillation.signals import SaveOnSignal, Terminated
from lcprune.errors import InputError
from tests.distillation import runs

USER = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_teacher(tmp_path_factory.mktemp("dropping") / "model", dropout=0.3)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


class Told(Callback):
    """Sends a signal to this process in the backward pass of one batch."""

    def __init__(self, batch: int, number: int = signal.SIGTERM) -> None:
        self.batch, self.number = batch, number

    def on_before_backward(self, trainer: Trainer, *_: object) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


def _fit(
    folder: Path, teacher: Path, text: Path, *callbacks: Callback, resume: Path | None = None, **settings: object
) -> DistillationModule:
    module = runs.student_of(teacher)
    torch.manual_seed(123 if resume else 0)
    trainer = runs.trainer_for(folder, *callbacks, runs.two_merges(), SaveOnSignal(), **settings)
    trainer.fit(module, datamodule=runs.data_for(teacher, text, validation_blocks=1), ckpt_path=resume)
    return module


# The first merge is at step 3.
@pytest.mark.parametrize(("settings", "batch", "step"), [({}, 2, 3), ({"accumulate_grad_batches": 2}, 6, 4)])
def test_sigterm_ends_the_run_behind_the_step_and_it_goes_on_exactly(
    dropping: Path, text: Path, tmp_path: Path, settings: dict[str, object], batch: int, step: int
):
    whole = _fit(tmp_path / "whole", dropping, text, **settings)
    with pytest.raises(Terminated, match=f"after optimizer step {step}") as caught:
        _fit(tmp_path / "parts", dropping, text, Told(batch), **settings)
    path = tmp_path / "parts" / "checkpoints" / "sigterm.ckpt"
    assert (caught.value.code, caught.value.checkpoint) == (143, path)
    assert read(path).history.depth == 5
    module = _fit(tmp_path / "parts", dropping, text, resume=path, **settings)
    assert module.history == whole.history
    assert runs.equal(runs.weights_of(module), runs.weights_of(whole))
    assert not path.exists()


def test_new_run_leaves_the_checkpoint_of_another_ones_stop(dropping: Path, text: Path, tmp_path: Path):
    with pytest.raises(Terminated) as caught:
        _fit(tmp_path, dropping, text, Told(2))
    before = caught.value.checkpoint.read_bytes()
    _fit(tmp_path, dropping, text)
    assert caught.value.checkpoint.read_bytes() == before


def test_sigterm_in_a_merge_lets_it_end(dropping: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = optim.carry_over

    def told(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(optim, "carry_over", told)
    with pytest.raises(Terminated, match="after optimizer step 3") as caught:
        _fit(tmp_path, dropping, text)
    assert read(caught.value.checkpoint).history.depth == 5


def test_sigterm_in_the_sanity_check_is_not_forgotten(dropping: Path, text: Path, tmp_path: Path):
    class Early(Callback):
        def on_validation_start(self, trainer: Trainer, *_: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated, match="after optimizer step 1"):
        _fit(tmp_path, dropping, text, Early(), num_sanity_val_steps=1)


def test_what_another_handler_would_do_at_once_is_done_behind_the_step(dropping: Path, text: Path, tmp_path: Path):
    """As Lightning's own for SLURM, which writes a checkpoint."""
    steps: list[int] = []
    callbacks = [Told(4, signal.SIGUSR1), Told(6, signal.SIGUSR1)]
    losses = runs.Losses()
    before = signal.signal(signal.SIGUSR1, lambda *_: steps.append(max(losses.seen)))
    try:
        _fit(tmp_path, dropping, text, losses, *callbacks)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert steps == [5]  # once


def test_signal_is_answered_by_its_own_handler_alone(dropping: Path, text: Path, tmp_path: Path):
    called: list[int] = []
    before = {number: signal.signal(number, lambda number, _: called.append(number)) for number in USER}
    try:
        _fit(tmp_path, dropping, text, Told(4, signal.SIGUSR1))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert called == [signal.SIGUSR1]


def test_place_before_the_merges_is_refused(dropping: Path, text: Path, tmp_path: Path):
    trainer = runs.trainer_for(tmp_path, SaveOnSignal(), runs.two_merges())
    with pytest.raises(InputError, match="SaveOnSignal stands before ProgressiveCollapse: put it last"):
        trainer.fit(runs.student_of(dropping), datamodule=runs.data_for(dropping, text))
