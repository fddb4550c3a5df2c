"""Surgery on a checkpoint: what a merge during training would have left in it, without training.

    IN -> the run as it stood when it wrote it -> merges.merge -> what a merge changes, in a copy of IN -> OUT

The trainer itself restores the run, up to where the next batch would begin, and the same functions merge as in the
loop: student, history, optimizer and scheduler become what they would have become there, bit for bit. Everything
else in the file (loops, position in the text, random states of all ranks, the scale of a gradient scaler) is handed on
as it is. This is the way for strategies that have no hold on single layers while they train: stop, merge, go on.
"""

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lcprune.distillation.callbacks import ProgressiveCollapse
from lcprune.distillation.checkpoint import KEY, Record, check_goes_on, load_file
from lcprune.distillation.merges import merge
from lcprune.distillation.module import DistillationModule
from lcprune.errors import InputError
from lcprune.merging.lineage import MergeHistory, MergeStep

Plan = Callable[[Trainer, DistillationModule], Sequence[MergeStep]]
"""What merges, once the run is restored."""
Checkpoint = dict[str, object]
"""A Lightning checkpoint as it is read from its file."""


def planned(collapse: ProgressiveCollapse, target: int) -> Plan:
    """As planner, operator and refit of a recipe say, down to a depth."""
    return lambda trainer, module: collapse.agreed_plan(trainer, module, target)


def given(steps: Sequence[MergeStep]) -> Plan:
    """Steps that are known already, which happen now."""
    return lambda trainer, module: [replace(step, global_step=trainer.global_step) for step in steps]


class _Done(Exception):
    """The merge is made, and training is not to begin."""


class _Surgery(Callback):
    """Merges where the first batch would begin, takes down what has changed, and ends the run."""

    def __init__(self, plan: Plan, collapse: ProgressiveCollapse) -> None:
        self.plan, self.collapse = plan, collapse
        self.changed: Checkpoint = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is restored by now but the random states."""
        assert isinstance(pl_module, DistillationModule)
        steps = self.plan(trainer, pl_module)
        if not steps:
            raise InputError("The planner found nothing to merge: name another one, or give --plan.")
        limit, schedule = self.collapse.max_perplexity_jump, self.collapse.schedule
        refused = pl_module.standing.refused
        merge(trainer, pl_module, steps, limit, schedule is not None and schedule.by_validation)
        if pl_module.standing.refused != refused:
            raise InputError(
                "The merge multiplies the calibration perplexity by more than "
                f"collapse.max_perplexity_jump={limit}, so nothing is written: raise that, merge fewer layers at a "
                "time, or name another planner, operator or refit."
            )
        pl_module.standing.merged(trainer.global_step)
        self.changed = _changed(trainer, pl_module)
        raise _Done


def collapse_checkpoint(
    source: Path,
    trainer: Trainer,
    module: DistillationModule,
    data: LightningDataModule,
    plan: Plan,
    collapse: ProgressiveCollapse,
) -> Checkpoint:
    """The checkpoint that a run would have written if it had merged right before.

    Args:
        source: A checkpoint that `check` accepts; it is not changed.
        trainer: On one device, without an end (`max_steps`, `max_epochs` -1), without loggers; its callbacks are taken
            off.
        module: As the run had it, without weights so far.
        data: As the run had it: for the plan, a refit, and the figures after the merge.
        plan: Of the merges.
        collapse: As the run has it: what a merge may cost, and by what recovery is judged afterwards.

    Raises:
        InputError: The merge costs more than it may.
    """
    surgery = _Surgery(plan, collapse)
    trainer.callbacks = [surgery]  # type: ignore[attr-defined]
    with suppress(_Done), warnings.catch_warnings():
        # Their states are handed on without them.
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
        trainer.fit(module, datamodule=data, ckpt_path=str(source))
    assert surgery.changed, "the run was over before it was restored"
    checkpoint = load_file(source)
    return _with_changes(checkpoint, surgery.changed)


def check(source: Path) -> Record:
    """What a checkpoint that can be merged in says about its student.

    Raises:
        InputError: If it is missing or not whole, or does not hold all that a run goes on from.
    """
    checkpoint = load_file(source)
    record = Record.of(checkpoint)
    check_goes_on(source)
    if "averaging_state" in checkpoint or "current_model_state" in checkpoint:
        raise InputError(
            f"{source} holds a running average of the weights beside them, which would keep the old depth: name a "
            "checkpoint of a run without WeightAveraging."
        )
    return record


def steps_of(plan: MergeHistory, done: MergeHistory) -> tuple[MergeStep, ...]:
    """What is left of a plan for a student that may have merged before.

    Args:
        plan: For the student as it stands; or for the teacher, and then it begins with what has been done.
        done: How the student came from the teacher.

    Raises:
        InputError: If it is neither, or has a refit that others follow.
    """
    rest = plan if plan.teacher_depth == done.depth else plan.after(done)
    if rest is None or not rest.steps:
        raise InputError(
            f"The plan is for a model of {plan.teacher_depth} layers, the checkpoint's student has {done.depth} of "
            f"{done.teacher_depth}: number its groups as the layers stand now (teacher_depth: {done.depth}), or let "
            "it begin with all merges that the student has."
        )
    early = [number for number, step in enumerate(rest.steps[:-1]) if step.refit is not None]
    if early:
        raise InputError(
            f"steps[{early[0]}] of the plan is followed by a refit and by more merges, which are done at once here: "
            "leave the refit to the last step, or merge twice."
        )
    # What was measured then says nothing of the student now.
    return tuple(replace(step, measured={}) for step in rest.steps)


def _changed(trainer: Trainer, module: DistillationModule) -> Checkpoint:
    changed: Checkpoint = {
        "state_dict": trainer.strategy.lightning_module_state_dict(),
        "optimizer_states": [trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }
    module.on_save_checkpoint(changed)
    return changed


def _with_changes(checkpoint: Checkpoint, changed: Checkpoint) -> Checkpoint:
    before, after = checkpoint[KEY], changed[KEY]
    assert isinstance(before, Mapping)
    assert isinstance(after, Mapping)
    states = checkpoint.get("callbacks", {})
    assert isinstance(states, Mapping)
    for name, state in states.items():
        if isinstance(state, MutableMapping):
            _forget_best(str(name), state)
    # No random number is drawn by a merge, and here there is one rank alone.
    return {**checkpoint, **changed, KEY: {**after, "rng": before["rng"]}}


def _forget_best(name: str, state: MutableMapping[str, object]) -> None:
    """As `companions` does to a callback in a run, to the state that one has saved under its name."""
    if {"best_model_score", "best_k_models"} <= set(state):
        state.update(best_model_score=None, best_model_path="", kth_best_model_path="", best_k_models={})
    elif {"wait_count", "best_score"} <= set(state):
        worst = -torch.inf if "'mode': 'max'" in name else torch.inf
        state.update(wait_count=0, best_score=torch.tensor(worst))
