"""Training from a teacher cache: as with the teacher where nothing is left out, and refused where it cannot be.

The teachers are bfloat16 where states are compared: what they compute is stored exactly.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lcprune import (
    AtSteps,
    Boundary,
    DistillationModule,
    Drop,
    FixedPlan,
    Labels,
    Local,
    Logits,
    OneShotRanking,
    Phase,
    ProgressiveCollapse,
)
from lcprune.distillation import objectives, recall
from lcprune.distillation.buckets import top
from lcprune.distillation.cache import Found, TeacherCache
from lcprune.distillation.levels import Level
from lcprune.distillation.passes import Wanted
from lcprune.distillation.teacher import Teacher, second_view
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.planners import Planner
from tests import builders
from tests.distillation import caches, runs

MERGED = MergeHistory(6, (MergeStep((0, 1), {"class_path": "Drop"}, (1.0, 0.0)),)).append(
    MergeStep((2, 3), {"class_path": "Drop"}, (1.0, 0.0))
)
EVERY: tuple[Level, ...] = (Logits(), Labels(0.5), Boundary(0.5, layers="all"), Local())
STATES = (1, 2, 4)
"""Behind which layers `merges` needs the stream, with Boundary and Local."""


class Exact(TeacherCache):
    """A cache that asks the teacher, and rounds nothing."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def look_up(self, input_ids: Tensor, layers: Iterable[int] = ()) -> Found:
        states = self.teacher({"input_ids": input_ids}, Wanted(outputs=sorted(layers)))
        assert states.last is not None
        logits = self.teacher.head(states.last).detach().flatten(0, 1)
        known = top(logits, logits.shape[-1])
        shape = input_ids.shape
        parts = (part.unflatten(0, shape) for part in (known.ids, known.log_p, known.log_tail))
        return Found(type(known)(*parts), states.layers)


@pytest.mark.parametrize("family", builders.ALL_FAMILIES)
def test_step_from_a_cache_is_the_step_with_the_teacher(family: builders.Family, batch: dict[str, Tensor]):
    batch["labels"][0, :5] = -100
    found = []
    for cached in (False, True):
        model = builders.tiny_llama(model_type=family, tied=False)
        student, teacher = second_view(model), Teacher(model)
        surgery.apply_all(student, MERGED.steps)
        for parameter in student.parameters():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_()
        if cached:
            passes = recall.run(EVERY, batch, student, teacher, MERGED.lineage, Exact(teacher))
        else:
            passes = objectives.run(EVERY, batch, student, teacher, MERGED.lineage)
        terms = objectives.objective(EVERY, passes, MERGED.lineage)
        terms["loss"].backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        found.append(({name: term.detach() for name, term in terms.items()}, gradients))
    assert set(found[0][0]) == {"loss", "logits", "labels", "boundary", "local"}
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_local_on_the_students_own_inputs_needs_the_targets_alone(batch: dict[str, Tensor]):
    levels = (Local(inputs="student"),)
    assert objectives.states_needed(levels, MERGED.lineage) == {1, 4}
    assert objectives.states_needed((Local(),), MERGED.lineage) == {1, 2, 4}
    model = builders.tiny_llama()
    student, teacher = second_view(model), Teacher(model)
    surgery.apply_all(student, MERGED.steps)
    both = [
        recall.run(levels, batch, student, teacher, MERGED.lineage, Exact(teacher)),
        objectives.run(levels, batch, student, teacher, MERGED.lineage),
    ]
    mine, theirs = (objectives.objective(levels, passes, MERGED.lineage)["loss"] for passes in both)
    torch.testing.assert_close(mine, theirs)


def merges(*steps: int, planner: Planner | None = None) -> ProgressiveCollapse:
    """Six layers to four, in two merges."""
    depths = {step: 5 - place for place, step in enumerate(steps)}
    planner = FixedPlan([[0, 1], [3, 4]]) if planner is None else planner
    return ProgressiveCollapse(AtSteps(depths), planner=planner, operator=Drop("first"))


def cache_of(teacher: Path, text: Path, folder: Path, **settings: object) -> Path:
    """A cache of the text's training blocks."""
    rows = runs.data_for(teacher, text).training_blocks()
    return caches.fill(folder, teacher, rows, **{"dtype": "bfloat16"} | settings)  # type: ignore[arg-type]


student_of = partial(runs.student_of, teacher_dtype="bfloat16", optimizer=runs.SGD, lr_scheduler=None)
PHASES = [Phase([Local()], steps=2), Phase([Logits(), Labels(0.3), Boundary(0.5)])]


@pytest.mark.parametrize("train", ["all", "after_merge"])
def test_run_with_every_token_kept_is_the_run_with_the_teacher(
    tiny_folder: Path, text: Path, tmp_path: Path, train: str
):
    cache = cache_of(tiny_folder, text, tmp_path / "cache", top_k=builders.VOCABULARY, layers=STATES)
    losses, ends = [], []
    for folder in (None, cache):
        seen = runs.Losses()
        module = student_of(tiny_folder, objective=None, phases=PHASES, train=train, teacher_cache=folder)
        trainer = runs.trainer_for(tmp_path, seen, merges(0, 4), max_steps=8)
        trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
        losses.append(seen.seen)
        ends.append(runs.weights_of(module.student))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(losses[1]) == 8
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=0, atol=1e-5, msg=name)


def test_teacher_runs_no_layer_while_training_and_does_for_validation(tiny_folder: Path, text: Path, tmp_path: Path):
    cache = cache_of(tiny_folder, text, tmp_path / "cache", layers=STATES)
    ran: dict[str, int] = {"training": 0, "validating": 0}

    class Watch(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
            def count(*_: object) -> None:
                ran["validating" if trainer.validating or trainer.sanity_checking else "training"] += 1

            assert pl_module.teacher is not None
            for layer in pl_module.teacher.model.model.layers:
                layer.register_forward_hook(count)

    module = student_of(tiny_folder, objective=None, phases=PHASES, teacher_cache=cache)
    trainer = runs.trainer_for(
        tmp_path, merges(0), Watch(), max_steps=4, val_check_interval=4, check_val_every_n_epoch=None
    )
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert ran == {"training": 0, "validating": 2 * 6}


def test_few_tokens_still_teach(tiny_folder: Path, text: Path, tmp_path: Path):
    cache = cache_of(tiny_folder, text, tmp_path / "cache", top_k=8)
    seen = runs.Losses()
    module = student_of(tiny_folder, objective=[Logits()], teacher_cache=cache)
    trainer = runs.trainer_for(tmp_path, seen, merges(0), max_steps=30, limit_val_batches=0)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert sum(list(seen.seen.values())[-5:]) < 0.8 * sum(list(seen.seen.values())[:5])


@pytest.mark.filterwarnings("ignore:phases")  # the run is over before the last one begins
def test_resumed_run_ends_as_one_that_was_not_stopped(tiny_folder: Path, text: Path, tmp_path: Path):
    cache = cache_of(tiny_folder, text, tmp_path / "cache", layers=STATES)

    def fit(folder: Path, steps: int, checkpoint: Path | None = None) -> DistillationModule:
        module = student_of(tiny_folder, objective=None, phases=PHASES, teacher_cache=cache)
        trainer = runs.trainer_for(
            folder, merges(0, 3), runs.checkpoints_in(folder, 3), max_steps=steps, limit_val_batches=0
        )
        trainer.fit(module, datamodule=runs.data_for(tiny_folder, text), ckpt_path=checkpoint)
        return module

    whole = runs.weights_of(fit(tmp_path / "whole", 5))
    fit(tmp_path / "half", 4)
    assert runs.equal(runs.weights_of(fit(tmp_path / "half", 5, tmp_path / "half" / "last.ckpt")), whole)


def refused(teacher: Path, text: Path, root: Path, callback: ProgressiveCollapse, **settings: object) -> str:
    """What a run says instead of training."""

    class NoStep(Callback):
        def on_train_batch_start(self, *_: object) -> None:
            pytest.fail("training began")

    module = student_of(teacher, **settings)
    trainer = runs.trainer_for(root, callback, NoStep(), max_steps=8, limit_val_batches=0)
    with pytest.raises(InputError) as caught:
        trainer.fit(module, datamodule=runs.data_for(teacher, text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


OVER_LATER = merges(0, 4, planner=OneShotRanking())
AT_ONCE = merges(0, planner=OneShotRanking())


@pytest.mark.parametrize(
    ("layers", "callback", "missing"),
    [
        ((1, 2), merges(0, 4), "layers 4, "),  # named, for a merge that is still far
        ((), merges(4), "layers 1, "),
        ((1, 2, 4), OVER_LATER, "layers 0, 3, 5, "),  # nobody knows which: all of them
        ((), AT_ONCE, "layers "),  # known once it has planned, before the first step
    ],
)
def test_cache_without_states_that_a_merge_will_need_is_refused(
    tiny_folder: Path, text: Path, tmp_path: Path, layers: Sequence[int], callback: ProgressiveCollapse, missing: str
):
    cache = cache_of(tiny_folder, text, tmp_path / "cache", layers=layers)
    message = refused(tiny_folder, text, tmp_path, callback, objective=[Logits(), Boundary()], teacher_cache=cache)
    assert f"lacks the states of teacher {missing}" in message


def test_planner_that_decides_on_the_way_is_served_by_a_cache_of_all_layers(
    tiny_folder: Path, text: Path, tmp_path: Path
):
    cache = cache_of(tiny_folder, text, tmp_path / "cache", layers=range(6))
    module = student_of(tiny_folder, teacher_cache=cache)
    trainer = runs.trainer_for(tmp_path, OVER_LATER, max_steps=6, limit_val_batches=0)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert module.history.depth == 4


def test_cache_of_other_text_is_refused_before_weights_are_loaded(tiny_folder: Path, text: Path, tmp_path: Path):
    cache = cache_of(tiny_folder, text, tmp_path / "cache")
    module = student_of(tiny_folder, objective=[Logits()], teacher_cache=cache)
    trainer = runs.trainer_for(tmp_path, max_steps=8, limit_val_batches=0)
    with pytest.raises(InputError, match=r"training blocks of 8 tokens \(it has"):
        trainer.fit(module, datamodule=runs.data_for(tiny_folder, text, block_size=8))
    assert module.teacher is None


def test_levels_that_a_cache_cannot_serve_are_refused_at_once(tiny_folder: Path):
    with pytest.raises(InputError, match="divergence=jsd"):
        runs.student_of(tiny_folder, objective=[Logits(divergence="jsd")], teacher_cache=Path("nowhere"))
