"""What a run is going to do: stages and phases as literal numbers, from a config alone."""

from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from lcprune import (
    ByTokens,
    DistillationModule,
    Evenly,
    FixedPlan,
    InputError,
    Labels,
    Local,
    Logits,
    Lora,
    Phase,
    ProgressiveCollapse,
    Schedule,
)
from lcprune.distillation.forecast import Batches, Forecast, forecast
from lcprune.merging.planners import Planner
from tests.builders import tiny_config

BATCHES = Batches(rows=2, length=16)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config and nothing else."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_config().save_pretrained(folder)
    return str(folder)


def found(
    teacher: str,
    schedule: Schedule | None,
    *,
    planner: Planner | None = None,
    max_steps: int = 100,
    accumulate: int = 1,
    **settings: object,
) -> Forecast:
    """Of a run on one CPU."""
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = DistillationModule(teacher=teacher, **settings)  # type: ignore[arg-type]
    return forecast(module, ProgressiveCollapse(schedule, planner=planner), trainer, BATCHES)


def test_forecast_has_a_stage_for_every_depth(teacher: str):
    result = found(teacher, Evenly(4, merges=2, first=10, last=60))
    assert [(stage.step, stage.depth) for stage in result.stages] == [(0, 6), (10, 5), (60, 4)]
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert [stage.parameters for stage in result.stages] == [97 * 32 + 32 + depth * layer for depth in (6, 5, 4)]
    assert result.peak == result.stages[0].memory


def test_forecast_of_a_merge_at_the_start_begins_behind_it(teacher: str):
    assert [(stage.step, stage.depth) for stage in found(teacher, Evenly(4)).stages] == [(0, 4)]


def test_forecast_without_a_schedule_has_one_stage(teacher: str):
    assert [(stage.step, stage.depth) for stage in found(teacher, None).stages] == [(0, 6)]


def test_forecast_counts_tokens_of_accumulated_batches_and_work_of_every_stage(teacher: str):
    result = found(teacher, Evenly(4, merges=2, first=10, last=60), accumulate=3)
    assert (result.tokens_per_step, result.tokens) == (96, 9600)
    whole, five, four = (stage.flops for stage in result.stages)
    assert result.flops == 10 * whole + 50 * five + 40 * four


def test_forecast_of_a_run_that_ends_by_epochs_names_no_total(teacher: str):
    result = found(teacher, Evenly(4), max_steps=-1)
    assert (result.steps, result.tokens, result.flops) == (None, None, None)


def test_forecast_says_where_planning_decides_what_trains(teacher: str):
    groups = FixedPlan([[1, 2], [3, 4]])
    unknown = found(teacher, Evenly(4), train="after_merge").stages[0]
    known = found(teacher, Evenly(4), planner=groups, train="after_merge").stages[0]
    assert (unknown.at_most, known.at_most) == (True, False)
    assert unknown.trained * 3 == known.trained * 4


def test_forecast_counts_phases_anew_from_every_merge(teacher: str):
    phases = [Phase([Local()], 20), Phase([Logits()])]
    schedule = Evenly(4, merges=2, first=0, last=60)
    stretches = [(each.first, each.end, *each.objective, each.train) for each in _phases(teacher, schedule, phases)]
    assert stretches == [
        (0, 20, "Local", "merged"),
        (20, 60, "Logits", "all"),
        (60, 80, "Local", "merged"),
        (80, 100, "Logits", "all"),
    ]


def test_forecast_counts_phases_from_the_start_where_they_begin_with_the_run(teacher: str):
    phases = [Phase([Labels()], 20), Phase([Logits()])]
    stretches = _phases(teacher, Evenly(4, merges=2, first=0, last=60), phases, phases_begin="run")
    assert [(each.first, each.end) for each in stretches] == [(0, 20), (20, 100)]


def test_forecast_of_one_phase_has_no_seams(teacher: str):
    result = found(teacher, Evenly(4, merges=2, first=0, last=60))
    assert [(each.first, each.end) for each in result.phases] == [(0, 100)]


def test_forecast_refuses_what_fit_would(teacher: str):
    with pytest.raises(InputError, match="must lie between 1 and 5"):
        found(teacher, Evenly(7))


def test_forecast_needs_no_weights(teacher: str):
    assert [path.name for path in Path(teacher).iterdir()] == ["config.json"]
    assert found(teacher, Evenly(4)).parameters == 97 * 32 + 32 + 6 * 9280


def _phases(teacher: str, schedule: Schedule, phases: list[Phase], **settings: object):  # type: ignore[no-untyped-def]
    return found(teacher, schedule, phases=phases, **settings).phases


def test_forecast_ends_with_the_run_and_names_what_comes_too_late(teacher: str):
    # 32 tokens a step: merges behind steps 2, 5 and 32.
    result = found(teacher, ByTokens(Evenly(3, merges=3, first=64, last=1024)), max_steps=20)
    assert [(stage.step, stage.depth) for stage in result.stages] == [(0, 6), (2, 5), (17, 4)]
    assert result.too_late == (3,)
    assert result.flops == sum(stage.flops * steps for stage, steps in zip(result.stages, (2, 15, 3), strict=True))


def test_forecast_of_a_sharded_run_divides_what_is_cut_and_adds_what_is_whole(teacher: str):
    one, two = (
        forecast(
            DistillationModule(teacher=teacher),
            ProgressiveCollapse(Evenly(4, merges=1, first=10, last=10)),
            Trainer(
                accelerator="cpu",
                devices=devices,
                strategy=ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1),
                max_steps=20,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
            ),
            BATCHES,
        )
        for devices in (1, 2)
    )
    whole, half = one.stages[0].memory, two.stages[0].memory
    for cut in ("teacher", "student", "optimizer"):
        assert getattr(half, cut) == getattr(whole, cut) // 2
    assert (half.activations, half.loss) == (whole.activations, whole.loss)
    layer, outside = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32, 97 * 32 + 32
    assert (whole.gathered, half.gathered) == (0, 4 * (2 * layer + 2 * outside))
    assert two.whole == 4 * (6 * layer + outside) // 2
    assert two.tokens_per_step == 2 * one.tokens_per_step


def test_forecast_of_a_student_that_is_whole_anyway_or_never_merges_counts_no_merge(teacher: str):
    assert found(teacher, Evenly(4)).whole == 0
    packed = {"train": "lora", "lora": Lora(base="nf4")}
    assert found(teacher, Evenly(4), **packed).whole > 0
    assert found(teacher, ByTokens(Evenly(4, merges=1, first=3200, last=3200)), **packed).whole == 0


@pytest.mark.parametrize(
    ("settings", "strategy", "message"),
    [
        ({"train": "lora", "lora": Lora(targets=["lm_head"])}, "auto", "the output layer of this llama is its embed"),
        ({"train": "lora"}, ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "with model.lora"),
    ],
)
def test_forecast_refuses_adapters_that_fit_would(
    teacher: str, settings: dict[str, object], strategy: Strategy | str, message: str
):
    trainer = Trainer(accelerator="cpu", max_steps=20, logger=False, enable_checkpointing=False, strategy=strategy)
    module = DistillationModule(teacher=teacher, **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        forecast(module, ProgressiveCollapse(Evenly(4)), trainer, BATCHES)
