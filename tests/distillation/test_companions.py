"""What users take along from Lightning, torch and bitsandbytes, in a run with two merges."""

import importlib.util
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.nn import Parameter
from torch.optim import Optimizer

from lcprune import (
    DistillationModule,
    ProgressiveCollapse,
    RewarmingCosine,
    RewarmingWSD,
    TextDataModule,
    Throughput,
)
from lcprune.errors import InputError
from tests.distillation import runs

Make = Callable[[Iterable[Parameter]], Optimizer]


class Run:
    """A fit with merges after steps 3 and 7, and what came of it."""

    def __init__(self, folder: Path, teacher: Path, text: Path) -> None:
        self.folder, self.teacher, self.text = folder, teacher, text

    def fit(self, *callbacks: Callback, model: dict[str, object] | None = None, **settings: object) -> Trainer:
        """Trains; `model` are settings of the module, the others the trainer's."""
        self.module = runs.student_of(self.teacher, **(model or {}))
        self.losses = runs.Losses()
        trainer = runs.trainer_for(self.folder, runs.two_merges(), self.losses, *callbacks, **settings)
        self.data: TextDataModule = runs.data_for(self.teacher, self.text)
        trainer.fit(self.module, datamodule=self.data)
        return trainer

    def check(self) -> None:
        """Both merges happened, every loss is a number, and every parameter has moved away from the teacher's."""
        assert self.module.history.lineage == ((0,), (1, 2), (3, 4), (5,))
        assert all(math.isfinite(loss) for loss in self.losses.seen.values())
        assert self.module.teacher is not None
        original = dict(self.module.teacher.model.named_parameters())
        for name, parameter in self.module.student.named_parameters():
            head, layer, tail = name.partition(".layers.")
            number, _, inner = tail.partition(".")
            # Drop("last") keeps the last member of a group.
            before = original[f"{head}.layers.{(0, 2, 4, 5)[int(number)]}.{inner}" if layer else name]
            assert torch.isfinite(parameter).all()
            assert not parameter.equal(before.to(parameter.dtype)), name


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path, text: Path) -> Run:
    return Run(tmp_path, tiny_folder, text)


def _metrics(path: Path) -> list[dict[str, str]]:
    header, *rows = (line.split(",") for line in path.read_text().splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


SGD = partial(torch.optim.SGD, lr=1e-1)
STILL_RATE: dict[str, object] = {"lr_scheduler": None}

MODELS: dict[str, dict[str, object]] = {
    "adamw_fused": {"optimizer": partial(torch.optim.AdamW, lr=1e-2, fused=True)},
    "adamw_8bit": {"optimizer": partial(AdamW8bit, lr=1e-2, min_8bit_size=256)},
    "adafactor": {"optimizer": partial(torch.optim.Adafactor, lr=1e-2)},
    "wsd": {"lr_scheduler": partial(RewarmingWSD, warmup_steps=2, rewarm_steps=2, decay=0.5)},
    "recompute": {"activations": "recompute"},
}


@pytest.mark.parametrize("name", MODELS)
def test_run_works_with_this_model_setting(run: Run, name: str):
    trainer = run.fit(model=MODELS[name])
    run.check()
    assert trainer.global_step == runs.STEPS


TRAINERS: dict[str, dict[str, object]] = {
    "clip_norm": {"gradient_clip_val": 1e-2},
    "clip_value": {"gradient_clip_val": 1e-2, "gradient_clip_algorithm": "value"},
    "32-true": {"precision": "32-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "16-mixed": {"precision": "16-mixed"},
    "accumulate": {"accumulate_grad_batches": 2},
    "csv": {"logger": True},
    "no_validation": {"limit_val_batches": 0},
}


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU. Using .*bf16-mixed")
@pytest.mark.parametrize("name", TRAINERS)
def test_run_works_with_this_trainer_setting(run: Run, name: str):
    trainer = run.fit(**TRAINERS[name])
    run.check()
    assert trainer.global_step == runs.STEPS
    assert run.module.teacher is not None
    stored = next(run.module.student.parameters()).dtype
    assert stored == (torch.bfloat16 if name == "bf16-true" else torch.float32)
    taught = next(run.module.teacher.model.parameters()).dtype
    assert taught == (torch.bfloat16 if name in ("bf16-mixed", "bf16-true", "16-mixed") else torch.float32)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_fused_optimizers_are_clipped_in_mixed_precision_too(run: Run, algorithm: str):
    ends = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = {"optimizer": partial(torch.optim.SGD, lr=1e-1, fused=fused)}
        run.fit(model=model, precision="bf16-mixed", gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
        ends.append(runs.weights_of(run.module))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_unscaled_before_they_are_clipped(run: Run, fused: bool):
    seen = Norms()
    # What fp16 does on a GPU, where it can be had on a CPU too: gradients 1,024 times as large until the clipping.
    scaled = MixedPrecision("bf16-mixed", "cpu")
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = partial(torch.optim.AdamW, lr=1e-2, fused=fused)
    run.fit(seen, model={"optimizer": optimizer}, plugins=[scaled], gradient_clip_val=0.01)
    run.check()
    assert max(seen.norms) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_go_with_the_step_that_takes_them_and_not_before(run: Run, accumulate: int):
    held: list[bool] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
            held.append(any(parameter.grad is not None for parameter in pl_module.student.parameters()))

    run.fit(Look(), accumulate_grad_batches=accumulate)
    assert held == [number % accumulate > 0 for number in range(1, runs.STEPS * accumulate + 1)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_recomputed_activations_change_nothing(run: Run, precision: str):
    ends = []
    for activations in ("keep", "recompute"):
        run.fit(model={"activations": activations}, precision=precision)
        ends.append(runs.weights_of(run.module))
    assert runs.equal(*ends)


class Norms(Callback):
    """Of the gradient that the optimizer gets: its norm and its largest entry."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.largest: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        clip = pl_module.configure_gradient_clipping

        def look(optimizer: Optimizer, *given: object, **named: object) -> None:
            clip(optimizer, *given, **named)
            self.look(optimizer)

        pl_module.configure_gradient_clipping = look

    def look(self, optimizer: Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())
        self.largest.append(max(gradient.abs().max().item() for gradient in gradients))


def test_clipping_by_norm_bounds_the_whole_gradient(run: Run):
    free, clipped = Norms(), Norms()
    run.fit(free)
    run.fit(clipped, gradient_clip_val=0.01)
    assert max(free.norms) > 1
    assert max(clipped.norms) == pytest.approx(0.01, rel=1e-4)


def test_clipping_by_value_bounds_every_entry(run: Run):
    free, clipped = Norms(), Norms()
    run.fit(free)
    run.fit(clipped, gradient_clip_val=0.001, gradient_clip_algorithm="value")
    assert max(free.largest) > 0.1
    assert max(clipped.largest) == pytest.approx(0.001)


def test_clipping_sees_the_gradient_of_the_mean_over_all_tokens(run: Run):
    # Two micro-batches of one block are one batch of two: the same norm is clipped, the same weights come out.
    ends = []
    for batch_size, accumulate in ((2, 1), (1, 2)):
        module = runs.student_of(run.teacher, optimizer=SGD, lr_scheduler=None)
        settings = {"max_steps": 3, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.05}
        trainer = runs.trainer_for(run.folder, **settings)
        torch.manual_seed(0)
        trainer.fit(module, datamodule=runs.data_for(run.teacher, run.text, batch_size=batch_size))
        ends.append(runs.weights_of(module))
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=1e-5, atol=1e-6)


def test_early_stopping_stops_at_a_threshold_that_the_student_reaches(run: Run):
    stop = EarlyStopping("val/perplexity", stopping_threshold=1e9, patience=100)
    with pytest.warns(UserWarning, match="the run ends with 5 layers, its schedule with 4"):
        trainer = run.fit(stop, val_check_interval=5, check_val_every_n_epoch=None)
    assert trainer.global_step == 5


WATCHED = {
    "val_perplexity": "has monitor=val_perplexity, which this run does not log, did you mean val/perplexity?",
    "speed": "has monitor=speed, which this run does not log: name one of val/perplexity, .*, train/boundary, depth",
    "train/tokens_per_second": "does not log",
    "lr-AdamW": "does not log",
}


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
@pytest.mark.parametrize("watched", WATCHED)
def test_metric_that_nothing_logs_is_refused_before_weights_are_loaded(
    run: Run, kind: type, watched: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcprune.distillation.resumable.load_pair", _never)
    trainer = runs.trainer_for(run.folder, runs.two_merges(), kind(monitor=watched))
    with pytest.raises(InputError, match=WATCHED[watched]):
        trainer.fit(runs.student_of(run.teacher), datamodule=runs.data_for(run.teacher, run.text))


class Logging(Callback):
    """Logs what nobody else does."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        pl_module.log("mine", 1.0)


@pytest.mark.parametrize(
    ("watched", "others"),
    [
        ("val/agreement", ()),
        ("train/boundary", ()),
        ("depth", ()),
        ("step", ()),
        ("train/scored_per_second", (Throughput(2),)),
        ("lr-AdamW", (LearningRateMonitor("step"),)),
        ("mine", (Logging(),)),
    ],
)
def test_metric_that_something_logs_can_be_watched(run: Run, watched: str, others: tuple[Callback, ...]):
    best = ModelCheckpoint(run.folder, "{depth:.0f}-{step}", watched)
    settings = {"val_check_interval": 6, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    trainer = runs.trainer_for(
        run.folder, runs.two_merges(), best, *others, logger=CSVLogger(run.folder, name=""), **settings
    )
    trainer.fit(runs.student_of(run.teacher), datamodule=runs.data_for(run.teacher, run.text))
    assert best.best_model_score is not None


@pytest.mark.parametrize(
    "callback", [LearningRateFinder(), ModelPruning("l1_unstructured", amount=0.1)], ids=lambda one: type(one).__name__
)
def test_callback_that_finds_nothing_to_work_with_is_refused_without_merges_too(
    run: Run, callback: Callback, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcprune.distillation.resumable.load_pair", _never)
    trainer = runs.trainer_for(run.folder, ProgressiveCollapse(), callback)
    with pytest.raises(InputError, match=f"{type(callback).__name__} looks for .*: remove it"):
        trainer.fit(runs.student_of(run.teacher), datamodule=runs.data_for(run.teacher, run.text))


def _never(*_: object) -> None:
    pytest.fail("weights were loaded before the mistake was found")


def test_early_stopping_sees_training_terms_too(run: Run):
    stop = EarlyStopping("train/loss", stopping_threshold=1e9, patience=100, check_on_train_epoch_end=True)
    trainer = run.fit(stop, max_steps=-1, max_epochs=3)
    assert trainer.current_epoch == 1


@pytest.mark.parametrize("kind", [RewarmingCosine, RewarmingWSD])
def test_learning_rate_monitor_shows_the_curve_with_its_new_warm_ups(run: Run, kind: type):
    logger = CSVLogger(run.folder, name="", version="")
    schedule = partial(kind, warmup_steps=1, rewarm_steps=1, floor=1.0)
    run.fit(LearningRateMonitor("step"), model={"lr_scheduler": schedule}, logger=logger, log_every_n_steps=1)
    rates = [float(row["lr-AdamW"]) for row in _metrics(run.folder / "metrics.csv") if row.get("lr-AdamW")]
    # Warm-ups in the first step and in the first after each merge.
    assert rates == pytest.approx([1e-2 * (0.5 if step in (0, 3, 7) else 1) for step in range(12)])


def test_accumulation_scheduler_changes_how_many_batches_make_a_step(run: Run):
    trainer = run.fit(GradientAccumulationScheduler({0: 4, 1: 1}), max_steps=-1, max_epochs=2, limit_train_batches=16)
    run.check()
    assert trainer.global_step == 16 // 4 + 16
    (config,) = trainer.lr_scheduler_configs
    assert config.scheduler.curve.total_steps == trainer.global_step


def test_accumulated_by_the_scheduler_is_accumulated_by_the_trainer(run: Run):
    ends = []
    for callbacks, settings in (([GradientAccumulationScheduler({0: 2})], {}), ([], {"accumulate_grad_batches": 2})):
        torch.manual_seed(0)
        run.fit(*callbacks, model=STILL_RATE, **settings)
        ends.append(runs.weights_of(run.module))
    assert runs.equal(*ends)


def test_csv_logger_has_every_metric(run: Run):
    logger = CSVLogger(run.folder, name="", version="")
    run.fit(
        Throughput(2),
        LearningRateMonitor("step"),
        logger=logger,
        log_every_n_steps=1,
        val_check_interval=6,
        check_val_every_n_epoch=None,
    )
    rows = _metrics(run.folder / "metrics.csv")
    for name in (
        "train/loss",
        "train/logits",
        "train/boundary",
        "depth",
        "val/perplexity",
        "val/agreement",
        "val/perplexity_after_merge",
        "lr-AdamW",
        "train/tokens_per_second",
    ):
        values = [float(row[name]) for row in rows if row.get(name)]
        assert values, name
        assert all(math.isfinite(value) for value in values)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the extra lcprune[loggers]")
def test_tensorboard_logger_has_every_metric(run: Run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(run.folder, name="", version="")
    run.fit(Throughput(2), logger=logger, log_every_n_steps=1)
    events = EventAccumulator(str(run.folder))
    events.Reload()
    assert {"train/loss", "depth", "val/perplexity_after_merge", "train/tokens_per_second"} <= set(
        events.Tags()["scalars"]
    )


def test_8_bit_adamw_resumes_where_it_was(run: Run):
    def module() -> DistillationModule:
        return runs.student_of(run.teacher, **MODELS["adamw_8bit"], **STILL_RATE)

    whole, first, second = module(), module(), module()
    resume = str(run.folder / "last.ckpt")
    for student, steps, checkpoint in ((whole, 10, None), (first, 8, None), (second, 10, resume)):
        torch.manual_seed(0)
        callbacks = (runs.two_merges(), runs.checkpoints_in(run.folder))
        trainer = runs.trainer_for(run.folder, *callbacks, max_steps=steps)
        trainer.fit(student, datamodule=runs.data_for(run.teacher, run.text), ckpt_path=checkpoint)
    assert runs.equal(runs.weights_of(whole), runs.weights_of(second))
