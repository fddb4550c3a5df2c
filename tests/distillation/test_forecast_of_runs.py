"""What a run was forecast to do and hold is what it does and holds."""

from dataclasses import replace
from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as lightning_callbacks

from lcprune import AtSteps, ByTokens, DistillationModule, FixedPlan, Logits, Lora, ProgressiveCollapse, Schedule
from lcprune.distillation.averaging import copies
from lcprune.distillation.forecast import Batches, Forecast, forecast
from lcprune.distillation.trained import Trained
from tests.builders import tiny_llama
from tests.distillation import runs
from tests.marks import slow

BATCHES = Batches(rows=2, length=16)
AVERAGES = pytest.mark.skipif(not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="came with lightning 2.6")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers and an output layer that adapters can be put on."""
    return runs.save_teacher(tmp_path_factory.mktemp("untied"), model=tiny_llama(tied=False))


def both(
    teacher: Path,
    text: Path,
    schedule: Schedule,
    *others: Callback,
    trainer: dict[str, object],
    **settings: object,
) -> tuple[Forecast, DistillationModule, Trainer]:
    """The forecast of a run, and the run."""
    collapse = ProgressiveCollapse(schedule, planner=FixedPlan([[1, 2], [3, 4]]))
    module = runs.student_of(teacher, objective=[Logits()], **settings)
    made = runs.trainer_for(text.parent, collapse, *others, **trainer)
    found = forecast(module, collapse, made, BATCHES)
    made.fit(module, datamodule=runs.data_for(teacher, text))
    return found, module, made


@pytest.mark.filterwarnings("ignore:collapse")
@pytest.mark.parametrize("steps", [4, 5, 6])
def test_run_merges_where_it_was_forecast_to_and_nowhere_else(steps: int, tiny_folder: Path, text: Path):
    # 32 tokens a step: merges behind steps 2 and 5.
    schedule = ByTokens(AtSteps({64: 5, 160: 4}))
    found, module, _ = both(tiny_folder, text, schedule, trainer={"max_steps": steps})
    assert [stage.step for stage in found.stages[1:]] == [step.global_step for step in module.history.steps]
    assert found.stages[-1].depth == module.history.depth
    assert found.too_late == ((4,) if steps < 6 else ())


class Held(Callback):
    """What there is at the end of a training step, in numbers and bytes."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
        """Counts every storage once; Lightning casts the student back when a run ends."""
        assert pl_module.teacher is not None
        state = (value for kept in trainer.optimizers[0].state.values() for value in kept.values())
        teachers = {parameter.data_ptr(): parameter.nbytes for parameter in pl_module.teacher.model.parameters()}
        own = {parameter.data_ptr(): parameter.nbytes for parameter in pl_module.student.parameters()}
        averages = (parameter for copy in copies(trainer) for parameter in copy.student.parameters())
        self.trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        self.bytes = {
            "teacher": sum(teachers.values()),
            "student": sum(size for place, size in own.items() if place not in teachers),
            "averages": sum(parameter.nbytes for parameter in averages),
            "optimizer": sum(value.nbytes for value in state if value.numel() > 1),
        }


def check(found: Forecast, held: Held) -> None:
    """Of a run that is as deep all the time."""
    stage = found.stages[-1]
    assert (stage.trained, stage.at_most) == (held.trained, False)
    assert replace(stage.memory, **held.bytes) == stage.memory


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], *slow(None, ["lm_head"])])
@pytest.mark.parametrize("train", ["lora", "lora_merged", "lora_after_merge"])
def test_adapters_and_merged_layers_under_them_are_those_of_the_run(
    train: Trained, targets: list[str] | None, untied: Path, text: Path
):
    held = Held()
    lora = Lora(rank=2, targets=targets)
    found, _, _ = both(untied, text, AtSteps({0: 4}), held, trainer={"max_steps": 2}, train=train, lora=lora)
    check(found, held)


@pytest.mark.parametrize("train", ["layers", "lora", *slow("all")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_what_is_cast_is_counted_as_it_is_held(
    precision: str, dtype: str, train: Trained, tiny_folder: Path, text: Path
):
    held = Held()
    trainer: dict[str, object] = {"max_steps": 2, "precision": precision}
    found, _, _ = both(tiny_folder, text, AtSteps({0: 4}), held, trainer=trainer, train=train, dtype=dtype)
    check(found, held)


@AVERAGES
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_averages_are_those_of_the_run(precision: str, tiny_folder: Path, text: Path):
    held = Held()
    average = lightning_callbacks.EMAWeightAveraging()
    trainer: dict[str, object] = {"max_steps": 2, "precision": precision}
    found, _, _ = both(tiny_folder, text, AtSteps({0: 4}), average, held, trainer=trainer)
    assert held.bytes["averages"] > 0
    check(found, held)


@AVERAGES
def test_averages_that_are_kept_on_the_cpu_take_nothing_of_the_device(tiny_folder: Path, tmp_path: Path):
    average = lightning_callbacks.EMAWeightAveraging(device="cpu")
    collapse = ProgressiveCollapse(None)
    found = forecast(runs.student_of(tiny_folder), collapse, runs.trainer_for(tmp_path, average), BATCHES)
    assert found.peak.averages == 0
