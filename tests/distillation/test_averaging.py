"""Running averages of the weights follow every merge; and Lightning's callbacks, all in one run with ours."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from transformers import PreTrainedModel

from lcprune import (
    AtSteps,
    Concat,
    DistillationModule,
    Drop,
    FixedPlan,
    ProgressiveCollapse,
    Rdsc,
    RidgeRefit,
    WeightedAverage,
)
from lcprune.distillation import averaging, merges
from lcprune.distillation.checkpoint import load_student, read
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeStep
from lcprune.merging.operators import Operator, spec_of
from lcprune.merging.remeasure import measure_activity
from tests import builders
from tests.distillation import runs

pytestmark = [
    pytest.mark.skipif(not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="came with lightning 2.6"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
]


def ema(decay: float = 0.5) -> Callback:
    return lightning_callbacks.EMAWeightAveraging(decay=decay)


@pytest.mark.parametrize("operator", [Drop(), WeightedAverage(), Rdsc()], ids=lambda one: type(one).__name__)
def test_average_after_a_merge_is_the_student_and_the_operator_of_what_they_were_apart(operator: Operator):
    step = MergeStep((1, 2, 3), spec_of(operator), (0.5, 0.25, 0.25))
    student, average, apart = (builders.tiny_llama(seed=seed) for seed in (0, 1, 2))
    with torch.no_grad():
        for mine, theirs, difference in zip(
            student.parameters(), average.parameters(), apart.parameters(), strict=True
        ):
            difference.copy_(theirs - mine)
    averaging.follow(average, [step], [()], {})
    for model in (student, apart):
        surgery.apply(model, step)
    for name, weight in average.named_parameters():
        expected = student.get_parameter(name) + apart.get_parameter(name)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


def _followed_through_concat() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student whose layers 1 and 2 were merged, and its average."""
    step = MergeStep((1, 2), spec_of(Concat()), (0.5, 0.5))
    student, average = builders.tiny_llama(seed=0), builders.tiny_llama(seed=1)
    batches = [{"input_ids": ids} for ids in builders.token_batches()]
    merged = surgery.apply(student, step, lambda wanted: measure_activity(student, batches, wanted)).merged
    averaging.follow(average, [step], [[parameter.data for parameter in merged]], {})
    return student, average


def test_average_has_storage_of_its_own_where_concat_started_it_afresh():
    student, average = _followed_through_concat()
    theirs = {parameter.data_ptr() for parameter in student.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in average.parameters()}


def test_average_of_what_concat_merged_starts_afresh_and_the_other_layers_keep_theirs():
    old = runs.weights_of(builders.tiny_llama(seed=1))
    student, average = _followed_through_concat()
    assert average.config.num_hidden_layers == 5
    for name, weight in average.named_parameters():
        fresh = ".layers.1." in name
        before = old[_before(name)]
        assert weight.equal(student.get_parameter(name) if fresh else before), name


def test_what_a_refit_adds_to_a_weight_is_added_to_its_average():
    student, average = builders.tiny_llama(seed=0), builders.tiny_llama(seed=1)
    name = "model.layers.2.mlp.down_proj.weight"
    before = {each: parameter.data for each, parameter in student.named_parameters()}
    student.get_parameter(name).data = student.get_parameter(name).data + 0.5
    added = averaging.added(before, student)
    assert list(added) == [name]
    old = runs.weights_of(average)
    averaging.follow(average, [], [], added)
    torch.testing.assert_close(average.get_parameter(name).data, old[name] + 0.5)
    assert runs.equal({**runs.weights_of(average), name: old[name]}, old)


class Average(Callback):
    """Averages by hand what the student is after every step; stands behind the merges."""

    def __init__(self, decay: float) -> None:
        self.decay, self.weights = decay, dict[str, torch.Tensor]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
        now = runs.weights_of(pl_module.student)
        if self.weights and len(now) < len(self.weights):
            assert trainer.global_step == 3  # Drop("last") of layers 1 and 2: what was layer 2 is layer 1 now
            self.weights = {name: self.weights[_before(name)] for name in now}
        old = self.weights or now
        self.weights = {name: self.decay * old[name] + (1 - self.decay) * now[name] for name in now}


def _before(name: str) -> str:
    head, layer, tail = name.partition(".layers.")
    number, _, inner = tail.partition(".")
    return f"{head}.layers.{(0, 2, 3, 4, 5)[int(number)]}.{inner}" if layer else name


def collapse(depths: dict[int, int], **settings: object) -> ProgressiveCollapse:
    usual = {"planner": FixedPlan([[1, 2], [3, 4]]), "operator": Drop("last")}
    return ProgressiveCollapse(AtSteps(depths), **usual | settings)  # type: ignore[arg-type]


Fit = Callable[..., tuple[DistillationModule, Trainer]]


@pytest.fixture
def fit(tiny_folder: Path, text: Path, tmp_path: Path) -> Fit:
    def run(
        *callbacks: Callback, model: dict[str, object] | None = None, ckpt_path: str | None = None, **settings: object
    ) -> tuple[DistillationModule, Trainer]:
        module = runs.student_of(tiny_folder, **(model or {}))
        trainer = runs.trainer_for(tmp_path, *callbacks, **settings)
        trainer.fit(module, datamodule=runs.data_for(tiny_folder, text), ckpt_path=ckpt_path)
        return module, trainer

    return run


def test_run_ends_with_the_averages_of_its_own_steps_through_the_merge(fit: Fit):
    by_hand = Average(0.5)
    module, _ = fit(collapse({3: 5}), ema(0.5), by_hand, max_steps=6)
    assert module.history.depth == 5
    for name, weight in module.student.named_parameters():
        torch.testing.assert_close(weight.data, by_hand.weights[name], rtol=1e-5, atol=1e-6)


def test_averages_of_a_student_that_does_not_move_stay_the_student_through_concat_and_refit(fit: Fit):
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "lr_scheduler": None}
    settings = {"operator": Concat(), "refit": RidgeRefit(layers="after")}
    plain, _ = fit(collapse({2: 5, 4: 4}, **settings), model=still, max_steps=6)
    module, _ = fit(ema(), collapse({2: 5, 4: 4}, **settings), model=still, max_steps=6)
    for name, weight in module.student.named_parameters():
        torch.testing.assert_close(weight, plain.student.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_teacher_and_buffers_are_left_alone(fit: Fit, tiny_folder: Path):
    module, _ = fit(collapse({3: 5}), ema(0.9), max_steps=6, val_check_interval=2, check_val_every_n_epoch=None)
    untouched = runs.student_of(tiny_folder)
    untouched.configure_model()
    assert module.teacher is not None
    assert untouched.teacher is not None
    assert runs.equal(runs.weights_of(module.teacher.model), runs.weights_of(untouched.teacher.model))
    for mine, theirs in zip(module.student.buffers(), untouched.student.buffers(), strict=False):
        assert mine.equal(theirs)


class Stopped(Exception):
    """The interruption of a run inside this process."""


def stop() -> None:
    raise Stopped


@pytest.mark.parametrize(("step", "point"), [(3, "before"), (3, "after"), (5, "after")])
def test_run_with_averages_that_was_interrupted_ends_like_the_whole_one(
    fit: Fit, tmp_path: Path, step: int, point: str
):
    whole, _ = fit(ema(), collapse({3: 5}), max_steps=7)
    with pytest.raises(Stopped):
        fit(runs.Interrupt(step, point, stop), ema(), collapse({3: 5}), runs.checkpoints_in(tmp_path), max_steps=7)
    path = str(tmp_path / "last.ckpt")
    module, _ = fit(ema(), collapse({3: 5}), runs.checkpoints_in(tmp_path), ckpt_path=path, max_steps=7)
    assert module.history == whole.history
    assert runs.equal(runs.weights_of(module), runs.weights_of(whole))


def test_measured_at_a_merge_is_the_averaged_student_that_the_checkpoint_holds(fit: Fit, tmp_path: Path):
    keeper = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    module, trainer = fit(ema(), collapse({3: 5}), keeper, max_steps=4)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    measured = module.history.steps[0].measured
    for key, same in (("state_dict", True), ("current_model_state", False)):
        module.load_state_dict(saved[key])
        found = merges.measure(trainer, module)["val/perplexity"]
        assert (found == pytest.approx(measured["val/perplexity"], rel=1e-6)) == same


@pytest.mark.parametrize("train", ["merged", "layers"])
def test_averages_beside_weights_of_the_teacher_are_refused(fit: Fit, train: str):
    said = f"where {train} is trained some are the teacher's own"
    with pytest.raises(InputError, match=said):
        fit(ema(), collapse({0: 5}), model={"train": train})
    with pytest.raises(InputError, match=said):
        fit(ema(), model={"train": train})  # without merges too


def test_averages_of_pieces_are_refused():
    trainer = SimpleNamespace(strategy=FSDPStrategy(), callbacks=[ema()])
    with pytest.raises(InputError, match="strategy=FSDPStrategy has them in pieces"):
        averaging.check(trainer, ["all"])  # type: ignore[arg-type]


def _agreement(**settings: object) -> dict[str, object]:
    return {"monitor": "val/agreement", "mode": "max"} | settings


def all_of_them(folder: Path) -> list[Callback]:
    """Everything that users put beside our callback."""
    return [
        ModelCheckpoint(folder, **_agreement(filename="best-{depth:.0f}", save_top_k=1)),  # type: ignore[arg-type]
        EarlyStopping(**_agreement(patience=3)),  # type: ignore[arg-type]
        ema(),
        LearningRateMonitor("step"),
        GradientAccumulationScheduler({0: 2, 1: 1}),
        collapse({3: 5, 7: 4}),
        runs.checkpoints_in(folder),
    ]


ALL = {
    "max_steps": -1,
    "max_epochs": 2,
    "limit_train_batches": 8,
    "check_val_every_n_epoch": None,
    "val_check_interval": 2,
    "log_every_n_steps": 1,
}


def test_all_callbacks_together_and_the_best_of_every_depth_is_kept_under_its_name(fit: Fit, tmp_path: Path):
    logger = CSVLogger(tmp_path, name="", version="")
    module, trainer = fit(*all_of_them(tmp_path), logger=logger, **ALL)
    assert trainer.global_step == 8 // 2 + 8
    assert [step.global_step for step in module.history.steps] == [3, 7]
    kept = {int(path.stem.rpartition("=")[2].split("-")[0]): path for path in tmp_path.glob("best-depth=*.ckpt")}
    assert sorted(kept) == [4, 5, 6]
    for depth, path in kept.items():
        student, record = load_student(path)
        assert record.history.depth == student.config.num_hidden_layers == depth
    rates = [row for row in (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",") if row.startswith("lr-")]
    assert rates == ["lr-AdamW"]
    assert all(math.isfinite(value.abs().sum().item()) for value in runs.weights_of(module).values())


def test_all_callbacks_together_resume_as_if_nothing_had_been(fit: Fit, tmp_path: Path):
    folders = [tmp_path / name for name in ("whole", "parts")]
    whole, _ = fit(*all_of_them(folders[0]), logger=CSVLogger(folders[0]), **ALL)
    parts = folders[1]
    with pytest.raises(Stopped):
        fit(runs.Interrupt(5, "after", stop), *all_of_them(parts), logger=CSVLogger(parts), **ALL)
    assert read(parts / "last.ckpt").history.depth == 5
    module, _ = fit(*all_of_them(parts), logger=CSVLogger(parts), ckpt_path=str(parts / "last.ckpt"), **ALL)
    assert module.history == whole.history
    assert runs.equal(runs.weights_of(module), runs.weights_of(whole))


@pytest.mark.parametrize("name", ["best", "best-{epoch}"])
def test_one_name_for_the_best_of_all_depths_is_refused(name: str, fit: Fit, tmp_path: Path):
    best = ModelCheckpoint(tmp_path, **_agreement(filename=name, enable_version_counter=False))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"best-\{depth:\.0f\}"):
        fit(best, collapse({3: 5}))


def test_name_of_the_merging_steps_checkpoint_says_the_depth_behind_the_merge(fit: Fit, tmp_path: Path):
    keeper = ModelCheckpoint(tmp_path, filename="{step}-{depth:.0f}", save_top_k=-1, every_n_train_steps=1)
    fit(keeper, collapse({2: 5}), max_steps=4)
    names = sorted(path.stem for path in tmp_path.glob("*.ckpt"))
    assert names == ["step=1-depth=6", "step=2-depth=5", "step=3-depth=5", "step=4-depth=5"]
