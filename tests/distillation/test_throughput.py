"""Tokens per second by a clock that only tests move; the arithmetic against torch's own count of it."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.flop_counter import FlopCounterMode

from lcprune import (
    AtSteps,
    DistillationModule,
    Drop,
    FixedPlan,
    Labels,
    Local,
    Logits,
    Phase,
    ProgressiveCollapse,
    Throughput,
)
from lcprune.distillation import callbacks as callbacks_room
from lcprune.distillation import throughput as throughput_room
from lcprune.distillation.levels import Boundary, Level
from lcprune.errors import InputError
from tests.distillation import runs

TOKENS, SCORED = 32, 30
"""Of a batch: two blocks of 16, the first token of which nothing predicts."""


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Passing(Callback):
    """Every batch takes 2 s, reading it 0.5 s, validation 1000 s."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *_: object) -> None:
        self.clock.seconds += 2.5

    def on_validation_batch_start(self, *_: object) -> None:
        self.clock.seconds += 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput_room, "perf_counter", clock)
    return clock


def _logged(folder: Path, name: str) -> dict[int, float]:
    header, *rows = (row.split(",") for row in (folder / "metrics.csv").read_text().splitlines())
    table = [dict(zip(header, row, strict=True)) for row in rows]
    return {int(row["step"]): float(row[name]) for row in table if row.get(name)}


def _fit(folder: Path, module: DistillationModule, text: Path, *callbacks: Callback, **settings: object) -> Trainer:
    trainer = runs.trainer_for(
        folder, *callbacks, logger=CSVLogger(folder, name="", version=""), log_every_n_steps=1, **settings
    )
    trainer.fit(module, datamodule=runs.data_for(Path(module.teacher_name), text))
    return trainer


def test_tokens_per_second_are_these(tiny_folder: Path, text: Path, tmp_path: Path, clock: Clock):
    trainer = _fit(tmp_path, runs.student_of(tiny_folder), text, Passing(clock), Throughput(2), max_steps=6)
    # The first batch warms up.
    assert _logged(tmp_path, "train/tokens_per_second") == {3: TOKENS / 2.5, 5: TOKENS / 2.5}
    assert _logged(tmp_path, "train/scored_per_second") == {3: SCORED / 2.5, 5: SCORED / 2.5}
    assert trainer.callback_metrics["train/tokens_per_second"] == TOKENS / 2.5
    assert "train/mfu" not in trainer.callback_metrics  # nobody knows the peak of a CPU


def test_window_is_one_of_optimizer_steps(tiny_folder: Path, text: Path, tmp_path: Path, clock: Clock):
    settings = {"max_steps": 5, "accumulate_grad_batches": 3}
    _fit(tmp_path, runs.student_of(tiny_folder), text, Passing(clock), Throughput(2), **settings)
    assert _logged(tmp_path, "train/tokens_per_second") == {2: TOKENS / 2.5, 4: TOKENS / 2.5}


def test_validation_does_not_count(tiny_folder: Path, text: Path, tmp_path: Path, clock: Clock):
    settings = {"max_steps": 7, "val_check_interval": 2, "check_val_every_n_epoch": None}
    _fit(tmp_path, runs.student_of(tiny_folder), text, Passing(clock), Throughput(3), **settings)
    assert clock.seconds > 1000
    assert _logged(tmp_path, "train/tokens_per_second") == {4: TOKENS / 2.5, 7: TOKENS / 2.5}


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_merge_does_not_count(
    tiny_folder: Path, text: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, first: bool
):
    merge = callbacks_room.merge

    def slow(*given: object) -> None:
        clock.seconds += 1000
        merge(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(callbacks_room, "merge", slow)
    both = [Throughput(2), runs.two_merges()]  # merges at 3 and 7
    _fit(tmp_path, runs.student_of(tiny_folder), text, Passing(clock), *(both if first else both[::-1]))
    figures = _logged(tmp_path, "train/tokens_per_second")
    assert list(figures) == ([3, 6, 10, 12] if first else [5, 9, 11])
    assert set(figures.values()) == {TOKENS / 2.5}


def test_padding_is_not_read(clock: Clock):
    ids = torch.ones(2, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    window = throughput_room._Window(6, Phase([Logits()]), 0, 0.0)
    window.count(batch)
    assert (int(window.tokens), int(window.scored)) == (6, 3 + 1)  # nor does padding predict


def test_nothing_is_kept_with_a_checkpoint_nor_from_an_earlier_fit(
    tiny_folder: Path, text: Path, tmp_path: Path, clock: Clock
):
    callback = Throughput(2)
    _fit(tmp_path / "1", runs.student_of(tiny_folder), text, Passing(clock), callback, max_steps=2)
    clock.seconds += 1000
    assert callback.state_dict() == {}
    _fit(tmp_path / "2", runs.student_of(tiny_folder), text, Passing(clock), callback, max_steps=3)
    assert _logged(tmp_path / "2", "train/tokens_per_second") == {3: TOKENS / 2.5}


def test_throughput_refuses_a_window_of_nothing():
    with pytest.raises(InputError, match="window=0"):
        Throughput(0)


class Counted(Callback):
    """What torch multiplies in the second batch, attention's own products aside."""

    def __init__(self) -> None:
        self.flops = 0.0
        self._mode: FlopCounterMode | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: DistillationModule, batch: object, index: int) -> None:
        if index == 1:
            self._mode = FlopCounterMode(display=False)
            self._mode.__enter__()

    def on_after_backward(self, *_: object) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            counts: Mapping[object, int] = self._mode.get_flop_counts()["Global"]
            self.flops = sum(count for kind, count in counts.items() if str(kind) in ("aten.mm", "aten.addmm"))
            self._mode = None


RUNS: dict[str, tuple[list[Level], str]] = {
    "all": ([Logits()], "all"),
    "boundary": ([Boundary(layers="all")], "layers"),
    "labels": ([Labels()], "layers"),
    "after_merge": ([Logits(), Boundary()], "after_merge"),
    "merged": ([Logits()], "merged"),
    "local": ([Local()], "all"),
    "local_students_inputs": ([Local(inputs="student")], "all"),
}


@pytest.mark.parametrize("run", RUNS)
def test_arithmetic_is_what_torch_counts(
    tiny_folder: Path, text: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, run: str
):
    monkeypatch.setattr(throughput_room, "get_available_flops", lambda *_: 1_000_000)
    objective, train = RUNS[run]
    module = runs.student_of(tiny_folder, objective=objective, train=train)
    collapse = ProgressiveCollapse(AtSteps({0: 4}), planner=FixedPlan([[1, 2], [3, 4]]), operator=Drop("last"))
    counted = Counted()
    trainer = _fit(tmp_path, module, text, Passing(clock), collapse, counted, Throughput(1), max_steps=2)
    # The losses add the head's gradient up with addmm_, which torch does not count.
    unseen = 2 * SCORED * module.student.lm_head.weight.numel() if train == "all" and objective == [Logits()] else 0
    assert counted.flops > 0
    assert trainer.callback_metrics["train/mfu"].item() * 2.5 * 1_000_000 == pytest.approx(
        counted.flops + unseen, rel=1e-6
    )


def test_recomputed_activations_are_not_counted_twice(
    tiny_folder: Path, text: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(throughput_room, "get_available_flops", lambda *_: 1_000_000)
    shares = []
    for activations in ("keep", "recompute"):
        module = runs.student_of(tiny_folder, activations=activations)
        trainer = _fit(tmp_path / activations, module, text, Passing(clock), Throughput(1), max_steps=2)
        shares.append(trainer.callback_metrics["train/mfu"].item())
    assert shares[0] == shares[1] > 0
