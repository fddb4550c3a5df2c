"""Surgery on a checkpoint equals surgery in the loop bit for bit, and what cannot be done is one sentence."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from lcprune import AtSteps, FixedPlan, OneShotRanking, ProgressiveCollapse, RidgeRefit
from lcprune.distillation import offline
from lcprune.distillation.adapters import Lora
from lcprune.distillation.checkpoint import KEY, Record, load_file, read
from lcprune.distillation.module import DistillationModule
from lcprune.errors import InputError
from lcprune.merging.concat import Concat
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Rdsc, WeightedAverage
from tests.distillation import runs

STEP = 5
MERGES: dict[str, tuple[Callable[[int], ProgressiveCollapse], dict[str, object], dict[str, object]]] = {
    "a pair averaged": (
        lambda depth: ProgressiveCollapse(
            AtSteps({STEP: depth}), planner=FixedPlan([[1, 2]]), operator=WeightedAverage()
        ),
        {},
        {},
    ),
    "planned, refitted": (
        lambda depth: ProgressiveCollapse(
            AtSteps({STEP: depth - 1}), planner=OneShotRanking(), operator=Concat(), refit=RidgeRefit(strengths=[1.0])
        ),
        {"train": "layers"},
        {"precision": "bf16-mixed"},
    ),
    "momentum, bfloat16": (
        lambda depth: ProgressiveCollapse(AtSteps({STEP: depth}), operator=Rdsc()),
        {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
        {"precision": "bf16-true", "accumulate_grad_batches": 2},
    ),
    "adapters": (
        lambda depth: ProgressiveCollapse(AtSteps({STEP: depth}), operator=WeightedAverage()),
        {"train": "lora", "lora": Lora(rank=2)},
        {},
    ),
}


def patience() -> EarlyStopping:
    return EarlyStopping("val/agreement", mode="max", patience=100)


def trained(
    folder: Path, module: DistillationModule, text: Path, *callbacks: Callback, **settings: object
) -> dict[str, object]:
    """The checkpoint of step 5."""
    folder.mkdir()
    torch.manual_seed(0)  # adapters are drawn
    callbacks = (*callbacks, patience(), runs.checkpoints_in(folder, STEP))
    often = {"max_steps": STEP + 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = runs.trainer_for(folder, *callbacks, **often | settings)
    trainer.fit(module, datamodule=runs.data_for(Path(module.teacher_name), text))
    return load_file(folder / "last.ckpt")


def merged(
    source: Path,
    module: DistillationModule,
    text: Path,
    plan: offline.Plan,
    collapse: ProgressiveCollapse | None = None,
    **settings: object,
):
    trainer = runs.trainer_for(source.parent, max_steps=-1, **settings)
    data = runs.data_for(Path(module.teacher_name), text)
    return offline.collapse_checkpoint(source, trainer, module, data, plan, collapse or ProgressiveCollapse())


def same(left: object, right: object) -> bool:
    """Equal all the way down, tensors bit for bit."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and left.equal(right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def steps_from(checkpoint: Mapping[str, object]) -> tuple[MergeStep, ...]:
    return Record.of(checkpoint).history.steps


FAST = "planned, refitted"


@pytest.mark.parametrize(
    "name", [name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in MERGES]
)
def test_merge_in_a_checkpoint_is_the_merge_in_the_loop_bit_for_bit(
    name: str, tiny_folder: Path, text: Path, tmp_path: Path
):
    collapse, of_module, of_trainer = MERGES[name]

    def module() -> DistillationModule:
        return runs.student_of(tiny_folder, **of_module)

    in_loop = trained(tmp_path / "loop", module(), text, collapse(5), **of_trainer)
    without = trained(tmp_path / "without", module(), text, ProgressiveCollapse(), **of_trainer)
    assert [step.global_step for step in steps_from(in_loop)][:1] == [STEP]
    assert not steps_from(without)
    source = tmp_path / "without" / "last.ckpt"
    target = Record.of(in_loop).history.depth
    planned = merged(source, module(), text, offline.planned(collapse(5), target), **of_trainer)
    plan = offline.steps_of(Record.of(in_loop).history, Record.of(without).history)
    given = merged(source, module(), text, offline.given(plan), **of_trainer)
    for offline_one in (planned, given):
        for key in in_loop:
            if key != "callbacks":
                assert same(in_loop[key], offline_one[key]), key
        (stopping,) = (state for name, state in offline_one["callbacks"].items() if "EarlyStopping" in name)
        (expected,) = (state for name, state in in_loop["callbacks"].items() if "EarlyStopping" in name)
        assert same(stopping, expected)
    assert not same(in_loop["optimizer_states"], without["optimizer_states"])
    assert same(load_file(source), without)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, text: Path) -> Path:
    """A checkpoint of step 5 whose student has merged layers 1 and 2 at step 2; read only."""
    folder = tmp_path_factory.mktemp("twice") / "run"
    collapse = ProgressiveCollapse(AtSteps({2: 5}), planner=FixedPlan([[1, 2]]))
    trained(folder, runs.student_of(tiny_folder), text, collapse)
    return folder / "last.ckpt"


def test_plan_is_read_from_where_the_student_stands_or_from_the_teacher_on(twice: Path):
    done = read(twice).history
    step = MergeStep((2, 3), {"class_path": "Drop"}, (1.0, 0.0), measured={"val/perplexity": 1.0})
    expected = (replace(step, measured={}),)
    assert offline.steps_of(MergeHistory(5, (step,)), done) == expected
    assert offline.steps_of(done.append(step), done) == expected
    early = replace(step, refit={"class_path": "RidgeRefit"})
    wrong: list[tuple[MergeHistory, str]] = [
        (MergeHistory(6, (step,)), "number its groups as the layers stand now"),
        (done, "number its groups as the layers stand now"),
        (
            MergeHistory(5, (early, MergeStep((0, 1), {"class_path": "Drop"}, (1.0, 0.0)))),
            "leave the refit to the last",
        ),
    ]
    for plan, sentence in wrong:
        with pytest.raises(InputError, match=sentence):
            offline.steps_of(plan, done)


def test_checkpoint_that_has_merged_merges_again_and_the_run_goes_on_from_it(
    twice: Path, tiny_folder: Path, text: Path, tmp_path: Path
):
    steps = (MergeStep((2, 3), {"class_path": "Drop"}, (1.0, 0.0)),)
    checkpoint = merged(twice, runs.student_of(tiny_folder), text, offline.given(steps))
    assert read(twice).history.depth == 5
    torch.save(checkpoint, tmp_path / "short.ckpt")
    module, losses = runs.student_of(tiny_folder), runs.Losses()
    later = ProgressiveCollapse(AtSteps({2: 5, 7: 3}), operator=WeightedAverage())
    trainer = runs.trainer_for(tmp_path, later, losses, patience(), runs.checkpoints_in(tmp_path, STEP), max_steps=9)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text), ckpt_path=str(tmp_path / "short.ckpt"))
    assert sorted(losses.seen) == [6, 7, 8, 9]
    assert [step.global_step for step in module.history.steps] == [2, 5, 7]
    assert module.history.depth == module.student.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda checkpoint: checkpoint.pop("optimizer_states"), "weights without the optimizer's state"),
        (lambda checkpoint: checkpoint.update(averaging_state={}), "running average of the weights"),
        (lambda checkpoint: checkpoint.pop(KEY), "lcprune did not write"),
    ],
)
def test_checkpoint_that_no_run_can_go_on_from_is_refused(
    twice: Path, tmp_path: Path, change: Callable[[dict[str, object]], object], sentence: str
):
    checkpoint = load_file(twice)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=sentence):
        offline.check(tmp_path / "other.ckpt")


def test_merge_in_a_checkpoint_that_costs_too_much_is_refused(twice: Path, tiny_folder: Path, text: Path):
    plan = offline.given((MergeStep((2, 3), {"class_path": "Drop"}, (1.0, 0.0)),))
    student = runs.student_of(tiny_folder)
    with pytest.raises(InputError, match=r"more than collapse\.max_perplexity_jump=1\.0, so nothing is written"):
        merged(twice, student, text, plan, ProgressiveCollapse(max_perplexity_jump=1.0))
