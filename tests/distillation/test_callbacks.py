"""When merges happen and what they bring along; the oracle: stop, do the surgery on the checkpoint, go on."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy

from lcprune import (
    AtSteps,
    BlockInfluence,
    ByTokens,
    DistillationModule,
    Drop,
    Evenly,
    FixedPlan,
    OneShotRanking,
    ProgressiveCollapse,
    Schedule,
    WeightedAverage,
)
from lcprune.distillation import callbacks as callbacks_room
from lcprune.distillation import resumable
from lcprune.distillation.checkpoint import KEY
from lcprune.distillation.standing import Standing
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeHistory, MergeStep
from tests.distillation import runs

Fit = Callable[..., tuple[DistillationModule, Trainer]]


@pytest.fixture
def fit(tiny_folder: Path, text: Path, tmp_path: Path) -> Fit:
    """Trains with the given callbacks; `module` and trainer settings can be given."""

    def run(*callbacks: Callback, module: DistillationModule | None = None, **settings: object):
        module = runs.student_of(tiny_folder) if module is None else module
        trainer = runs.trainer_for(tmp_path, *callbacks, **settings)
        trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
        return module, trainer

    return run


class Diary(Callback):
    """Depth, optimizer size and leftovers after every optimizer step; stands behind ProgressiveCollapse."""

    def __init__(self) -> None:
        self.depths: dict[int, int] = {}
        self.held: dict[int, int] = {}
        self.gradients: dict[int, int] = {}
        self.batches: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
        step = trainer.global_step
        self.batches.append(step)
        self.depths.setdefault(step, len(pl_module.student.model.layers))
        self.held[step] = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
        self.gradients.setdefault(step, sum(p.grad is not None for p in pl_module.student.parameters()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_merges_happen_right_after_the_scheduled_optimizer_steps(fit: Fit, accumulate: int):
    diary = Diary()
    module, trainer = fit(runs.two_merges(), diary, accumulate_grad_batches=accumulate, max_steps=9)
    assert trainer.global_step == 9
    assert diary.batches[-1] == 9
    assert len(diary.batches) == 9 * accumulate
    depths = {1: 6, 2: 6, 3: 5, 4: 5, 5: 5, 6: 5, 7: 4, 8: 4, 9: 4}
    assert {step: depth for step, depth in diary.depths.items() if step} == depths
    held = {step: 9 * depth + 2 for step, depth in depths.items()}
    assert {step: count for step, count in diary.held.items() if step} == held
    assert not any(count for step, count in diary.gradients.items() if step)
    assert [step.global_step for step in module.history.steps] == [3, 7]
    assert module.history.lineage == ((0,), (1, 2), (3, 4), (5,))
    assert module.student.config.num_hidden_layers == 4


def test_merge_at_step_zero_happens_before_the_first_batch(fit: Fit):
    diary = Diary()
    collapse = ProgressiveCollapse(AtSteps({0: 5, 2: 4}), planner=FixedPlan([[1, 2], [3, 4]]), operator=Drop("last"))
    module, _ = fit(collapse, diary, max_steps=3)
    assert diary.depths == {1: 5, 2: 4, 3: 4}
    assert [step.global_step for step in module.history.steps] == [0, 2]


def test_history_holds_what_was_measured_right_after_the_merge(fit: Fit, tiny_folder: Path):
    # Nothing moves: what is validated after step 4 is what the merge at step 3 left.
    collapse = ProgressiveCollapse(AtSteps({3: 5}), planner=FixedPlan([[1, 2]]), operator=Drop("last"))
    settings = {"val_check_interval": 4, "check_val_every_n_epoch": None, "max_steps": 4}
    module, trainer = fit(collapse, module=_still(tiny_folder), **settings)
    measured = module.history.steps[-1].measured
    assert set(measured) == {"val/perplexity", "val/teacher_perplexity", "val/agreement"}
    for name, value in measured.items():
        assert value == pytest.approx(trainer.callback_metrics[name].item(), rel=1e-6)
    assert measured["val/perplexity"] != measured["val/teacher_perplexity"]


def test_scores_of_the_plan_reach_the_history(fit: Fit):
    module, _ = fit(ProgressiveCollapse(AtSteps({1: 4}), planner=OneShotRanking(BlockInfluence())), max_steps=2)
    assert module.history.depth == 4
    for step in module.history.steps:
        assert {"BlockInfluence", "weight_cosine"} <= set(step.scores)


def test_depth_and_figures_after_the_merge_are_logged(fit: Fit, tmp_path: Path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(runs.two_merges(), logger=logger, log_every_n_steps=1, max_steps=9)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    table = [dict(zip(names, row.split(","), strict=True)) for row in rows[1:]]
    depths = {int(row["step"]): float(row["depth"]) for row in table if row.get("train/loss")}
    assert depths == {0: 6, 1: 6, 2: 6, 3: 5, 4: 5, 5: 5, 6: 5, 7: 4, 8: 4}
    after = {int(row["step"]): float(row["depth"]) for row in table if row["val/perplexity_after_merge"]}
    assert after == {3: 5, 7: 4}


def test_checkpoint_of_the_merging_step_contains_the_merge(fit: Fit, tmp_path: Path):
    keeper = ModelCheckpoint(
        tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False
    )
    fit(keeper, runs.two_merges(), max_steps=8)
    depths = {}
    for step in range(1, 9):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=False)
        depths[step] = MergeHistory.from_dict(saved[KEY]["history"]).depth
        layers = {name.split(".layers.")[1].split(".")[0] for name in saved["state_dict"] if ".layers." in name}
        assert len(layers) == depths[step]
        assert len(saved["optimizer_states"][0]["param_groups"][0]["params"]) == 9 * depths[step] + 2
    assert depths == {1: 6, 2: 6, 3: 5, 4: 5, 5: 5, 6: 5, 7: 4, 8: 4}


def test_planner_that_finds_nothing_lets_the_run_go_on(fit: Fit, monkeypatch: pytest.MonkeyPatch):
    collapse = runs.two_merges()
    monkeypatch.setattr(FixedPlan, "plan", lambda *_: ())
    with pytest.warns(UserWarning, match="the run ends with 6 layers, its schedule with 4"):
        module, trainer = fit(collapse)
    assert module.history.steps == ()
    assert trainer.global_step == 12


def _surgery_on_checkpoint(checkpoint: dict, folder: Path, step: MergeStep) -> None:  # type: ignore[type-arg]
    """What `ProgressiveCollapse` does in the loop, done with a file: weights, history, Adam's state by name."""
    module = DistillationModule(teacher=str(folder))
    module.configure_model()
    module.load_state_dict(checkpoint["state_dict"])
    before = [name for name, _ in module.named_parameters()]
    surgery.apply(module.student, step)
    checkpoint["state_dict"] = module.state_dict()
    checkpoint[KEY]["history"] = MergeHistory(6, (step,), str(folder)).to_dict()
    (optimizer,) = checkpoint["optimizer_states"]
    known = dict(zip(before, (optimizer["state"][index] for index in range(len(before))), strict=True))
    state = {}
    for index, (name, _) in enumerate(module.named_parameters()):
        head, layer, tail = name.partition(".layers.")
        number, _, inner = tail.partition(".")
        if layer and int(number) > step.base:
            name = f"{head}.layers.{int(number) + step.absorbed}.{inner}"
        fresh = bool(layer) and int(number) == step.base
        state[index] = {key: value * 0 if fresh else value for key, value in known[name].items()}
    optimizer["state"] = state
    optimizer["param_groups"][0]["params"] = list(range(len(state)))


def test_merge_in_the_loop_is_stopping_doing_surgery_and_going_on(
    fit: Fit, tiny_folder: Path, text: Path, tmp_path: Path
):
    step = MergeStep((2, 3), {"class_path": "WeightedAverage"}, (0.5, 0.5), global_step=4)
    collapse = ProgressiveCollapse(AtSteps({4: 5}), planner=FixedPlan([[2, 3]]), operator=WeightedAverage())

    def module() -> DistillationModule:
        return runs.student_of(tiny_folder, lr_scheduler=None)

    losses = runs.Losses()
    in_loop, _ = fit(collapse, losses, module=module(), max_steps=9)

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    fit(Save(), module=module(), max_steps=5)
    checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    _surgery_on_checkpoint(checkpoint, tiny_folder, step)
    torch.save(checkpoint, tmp_path / "merged.ckpt")
    other, later = module(), runs.Losses()
    runs.trainer_for(tmp_path, later, max_steps=9).fit(
        other, datamodule=runs.data_for(tiny_folder, text), ckpt_path=str(tmp_path / "merged.ckpt")
    )
    assert later.seen == {index: losses.seen[index] for index in range(5, 10)}
    assert runs.equal(runs.weights_of(other), runs.weights_of(in_loop))


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when weights are read."""
    monkeypatch.setattr(
        resumable, "load_pair", lambda *_: pytest.fail("weights were loaded before the mistake was told")
    )


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("collapse", "said"),
    [
        (ProgressiveCollapse(AtSteps({1: 6})), "target depth 6 must lie between 1 and 5"),
        (ProgressiveCollapse(AtSteps({1: 0})), "target depth 0 must lie between 1 and 5"),
        (ProgressiveCollapse(Evenly(7)), "target depth 7 must lie between 1 and 5"),
        (ProgressiveCollapse(AtSteps({12: 5})), r"behind trainer\.max_steps=12"),
        (ProgressiveCollapse(AtSteps({1: 5}), planner=FixedPlan([[5, 6]])), "layer 6 does not exist"),
    ],
)
def test_impossible_schedule_is_refused_before_weights_are_loaded(fit: Fit, collapse: ProgressiveCollapse, said: str):
    with pytest.raises(InputError, match=said):
        fit(collapse)


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    "other",
    [
        lambda: StochasticWeightAveraging(swa_lrs=1e-3),
        lambda: ModelPruning("l1_unstructured", amount=0.1),
    ],
)
def test_callback_that_holds_on_to_weights_is_refused(fit: Fit, other: Callable[[], Callback]):
    with pytest.raises(InputError, match="remove it"):
        fit(runs.two_merges(), other())


@pytest.mark.usefixtures("nothing_loaded")
def test_stochastic_weight_averaging_is_refused_without_merges_too(fit: Fit):
    with pytest.raises(InputError, match="would average nothing: remove it"):
        fit(ProgressiveCollapse(), StochasticWeightAveraging(swa_lrs=1e-3))


@pytest.mark.parametrize(("schedule", "times"), [(Evenly(5), 1), (ByTokens(AtSteps({64: 5})), 7)])
def test_only_a_schedule_that_goes_by_tokens_lets_ranks_meet_at_every_step(
    schedule: Schedule, times: int, fit: Fit, monkeypatch: pytest.MonkeyPatch
):
    asked, tokens = [], Standing.tokens

    def counting(standing: Standing) -> int:
        asked.append(standing)
        return tokens(standing)

    monkeypatch.setattr(Standing, "tokens", counting)
    fit(ProgressiveCollapse(schedule), max_steps=4)
    assert len(asked) == times


@pytest.mark.usefixtures("nothing_loaded")
def test_data_without_calibration_batches_is_refused(tiny_folder: Path, text: Path, tmp_path: Path):
    class Bare(LightningDataModule):
        """Loaders and nothing to plan by."""

        inner = runs.data_for(tiny_folder, text)

        def train_dataloader(self) -> object:
            self.inner.setup()
            return self.inner.train_dataloader()

        val_dataloader = train_dataloader

    trainer = runs.trainer_for(tmp_path, runs.two_merges())
    with pytest.raises(InputError, match=r"calibration_batches\(\)"):
        trainer.fit(runs.student_of(tiny_folder), datamodule=Bare())


class DeepSpeedStrategy(DDPStrategy):
    """As Lightning's, which descends from DDP and is told by its name: deepspeed need not be installed."""


class XLAStrategy(DDPStrategy):
    """Likewise."""


@pytest.mark.parametrize(
    "strategy", [FSDPStrategy(), DeepSpeedStrategy(), XLAStrategy()], ids=lambda strategy: type(strategy).__name__
)
def test_strategy_without_an_adapter_is_refused_and_may_train_without_merges(strategy: Strategy, tiny_folder: Path):
    # These refuse CPUs by themselves, so the trainer here is only as much of one as `setup` looks at
    merging, module = runs.two_merges(), runs.student_of(tiny_folder)
    trainer = SimpleNamespace(
        strategy=strategy, precision="32-true", max_steps=12, callbacks=[], datamodule=None, fast_dev_run=False
    )
    name = type(strategy).__name__
    with pytest.raises(InputError, match=rf"trainer\.strategy={name} .*`lcprune collapse-checkpoint IN OUT`\.$"):
        merging.setup(trainer, module, "fit")  # type: ignore[arg-type]
    ProgressiveCollapse().check(trainer, module)  # type: ignore[arg-type]


def test_fixed_plan_in_stages_may_name_the_teachers_last_layers_at_every_stage(fit: Fit):
    plan = FixedPlan([[1, 2], [4, 5]])
    module = fit(ProgressiveCollapse(AtSteps({1: 5, 2: 4}), planner=plan), max_steps=3)[0]
    assert module.history.lineage == ((0,), (1, 2), (3,), (4, 5))


def test_other_modules_are_refused(tmp_path: Path):
    trainer = runs.trainer_for(tmp_path, runs.two_merges())
    with pytest.raises(InputError, match="LightningModule, which has none"):
        runs.two_merges().setup(trainer, LightningModule(), "fit")


def test_schedule_that_the_epochs_cannot_reach_is_refused(fit: Fit):
    # 65 batches an epoch, so a run of one epoch ends long before step 1000
    with pytest.raises(InputError, match="1000"):
        fit(ProgressiveCollapse(AtSteps({1000: 5})), max_steps=-1, max_epochs=1, limit_train_batches=3)


def test_ranks_with_other_plans_are_noticed():
    def trainer(*digests: str) -> SimpleNamespace:
        gathered = torch.tensor([int(digest[:15], 16) for digest in digests])
        strategy = SimpleNamespace(root_device=torch.device("cpu"), all_gather=lambda mine: gathered)
        return SimpleNamespace(strategy=strategy)

    mine, other = (MergeHistory(depth).digest for depth in (6, 7))
    callbacks_room._compare(trainer(mine, mine), mine)  # type: ignore[arg-type]
    for digests in ((mine, other), (other, mine)):
        with pytest.raises(RuntimeError, match="different plans"):
            callbacks_room._compare(trainer(*digests), mine)  # type: ignore[arg-type]


def _still(folder: Path) -> DistillationModule:
    """Nothing moves, so that figures change at merges only."""
    return runs.student_of(folder, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), lr_scheduler=None)


EVERY_STEP = {"val_check_interval": 1, "check_val_every_n_epoch": None}


def _agreeing(kind: type[Callback], **settings: object) -> Callback:
    return kind(monitor="val/agreement", mode="max", **settings)  # type: ignore[call-arg]


@pytest.mark.parametrize(("merged", "stopped"), [(False, 4), (True, 6)])
def test_patience_of_early_stopping_begins_afresh_at_a_merge(fit: Fit, tiny_folder: Path, merged: bool, stopped: int):
    # Validated after every step, never better: the first figure, then three without gain.
    merging = [ProgressiveCollapse(AtSteps({3: 5}), planner=FixedPlan([[1, 2]]))] if merged else []
    patient = _agreeing(EarlyStopping, patience=3)
    _, trainer = fit(*merging, patient, module=_still(tiny_folder), max_steps=11, **EVERY_STEP)
    assert trainer.global_step == stopped


def test_best_checkpoint_is_one_of_the_new_depth(fit: Fit, tiny_folder: Path, tmp_path: Path):
    best = _agreeing(ModelCheckpoint, dirpath=tmp_path, filename="{step}")
    collapse = ProgressiveCollapse(AtSteps({3: 5}), planner=FixedPlan([[1, 2]]))
    module, _ = fit(collapse, best, module=_still(tiny_folder), max_steps=5, **EVERY_STEP)
    assert isinstance(best, ModelCheckpoint)
    assert best.best_model_path == str(tmp_path / "step=3.ckpt")
    assert best.best_model_score is not None
    assert best.best_model_score.item() == pytest.approx(module.history.steps[0].measured["val/agreement"])
    assert best.best_model_score < 1


def test_best_score_right_after_a_merge_is_not_the_deeper_students(fit: Fit, tiny_folder: Path, tmp_path: Path):
    # Validated at 2 (agreement 1), merged at 3, where ModelCheckpoint saves by the last figure it knows.
    best = _agreeing(ModelCheckpoint, dirpath=tmp_path, every_n_train_steps=1)
    collapse = ProgressiveCollapse(AtSteps({3: 5}), planner=FixedPlan([[1, 2]]))
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 5}
    fit(collapse, best, module=_still(tiny_folder), **settings)
    assert isinstance(best, ModelCheckpoint)
    assert best.best_model_score is not None
    assert best.best_model_score < 1
