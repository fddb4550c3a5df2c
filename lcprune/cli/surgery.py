"""`collapse-checkpoint`: merges in a checkpoint, between two runs of `fit` that cannot merge themselves."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lcprune.cli import bars, budgets, options, tables
from lcprune.cli.machines import OneDevice
from lcprune.cli.quiet import quieten
from lcprune.cli.training import RecipeCLI, collapse_of
from lcprune.distillation import offline, optim
from lcprune.distillation.beforehand import try_out
from lcprune.distillation.callbacks import ProgressiveCollapse
from lcprune.distillation.checkpoint import Record
from lcprune.distillation.storing import AtomicCheckpointIO
from lcprune.errors import InputError
from lcprune.files import check_file
from lcprune.merging import refit as refits
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.budget import Budget, Depth, one_of
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.operators import from_spec

USAGE = "IN OUT --config RECIPE.yaml"
EXAMPLES = """The recipe is the run's own; of its trainer only precision and accelerator count here. Planner, operator
and refit are those of `collapse:`, and do what they would have done in training, bit for bit on one device.

examples, for a run under FSDP or DeepSpeed whose recipe says collapse.schedule: null:
  lcprune collapse-checkpoint runs/x/checkpoints/last.ckpt short.ckpt --config recipe.yaml --target-depth 24
  lcprune collapse-checkpoint last.ckpt short.ckpt --config recipe.yaml --plan plan.json
  lcprune fit --config recipe.yaml --ckpt_path short.ckpt
"""
WITHOUT_TRAINING = (
    "--trainer.logger=false",
    "--trainer.callbacks=[]",
    "--trainer.profiler=null",
    "--trainer.max_steps=-1",
    "--trainer.max_epochs=-1",
    "--trainer.max_time=null",
    "--trainer.limit_train_batches=1.0",
    "--trainer.fast_dev_run=false",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
)
"""The trainer's settings that restoring a run asks for, whatever the recipe says."""


def run(command: str, arguments: list[str]) -> None:
    """`lcprune collapse-checkpoint IN OUT --config RECIPE.yaml`."""
    quieten()
    paths, rest = _paths(arguments)
    own, recipe_arguments = options.split(
        command,
        USAGE,
        rest,
        *budgets.OPTIONS[:3],
        (
            "--plan",
            Path,
            "Execute this plan (JSON, groups numbered as the student's layers stand) instead of making one.",
        ),
        options.DEVICE,
        about="Merges layers of the student in a checkpoint, between two runs of fit that cannot merge themselves.",
        examples=EXAMPLES,
    )
    if len(paths) != 2:
        raise InputError(
            f"Name the checkpoint to read and the one to write, before any option: lcprune {command} {USAGE}."
        )
    source, out = paths
    given, budget = _asked(own)
    if out.exists():
        raise InputError(f"{out} exists: name a file that does not, or move it away.")
    check_file("OUT", out)
    record = offline.check(source)
    cli = OneDevice([*recipe_arguments, *WITHOUT_TRAINING], own.device)
    plan = _plan(cli, record, given, budget)
    with bars.shown():
        objects = (cli.trainer, cli.model, cli.datamodule)
        checkpoint = offline.collapse_checkpoint(source, *objects, plan, collapse_of(cli))
    AtomicCheckpointIO().save_checkpoint(checkpoint, out)
    history = Record.of(checkpoint).history
    tables.plan(history)
    print(f"{out}: {record.history.depth} layers -> {history.depth}, after optimizer step {checkpoint['global_step']}")
    print(f"go on with: lcprune fit --config RECIPE.yaml --ckpt_path {out}")


def _paths(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """What comes before the first option, and the rest."""
    first = next((place for place, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return [Path(argument) for argument in arguments[:first]], list(arguments[first:])


def _asked(own: argparse.Namespace) -> tuple[MergeHistory | None, Budget | None]:
    """The plan or the budget that the options name; None and None = as the recipe's schedule ends."""
    options.check_loading(argparse.Namespace(device=own.device, dtype=None))
    budget = one_of(target_depth=own.target_depth, target_params=own.target_params, target_size=own.target_size)
    if own.plan is None:
        return None, budget
    if budget is not None:
        raise InputError("--plan says what merges already, a target means nothing beside it: give one of them.")
    return MergeHistory.load(own.plan), None


def _plan(cli: RecipeCLI, record: Record, given: MergeHistory | None, budget: Budget | None) -> offline.Plan:
    """What will merge; refuses before weights are loaded what does not fit recipe, checkpoint and model together."""
    module, collapse = cli.model, collapse_of(cli)
    record.check_fits(module.teacher_name, module.fingerprint)
    record.check_adapters(None if module.lora is None else module.lora.record)
    record.check_begun(module.begun)
    optim.check(try_out(module.make_optimizer, module.make_scheduler))
    module.check_goes_on(record)
    layout = layout_of(module.teacher_config)
    if given is not None:
        steps = offline.steps_of(given, record.history)
        for step in steps:
            from_spec(step.operator).check(layout)
            if step.refit is not None:
                refits.from_spec(step.refit).check(layout)
        return offline.given(steps)
    target = _target(cli, collapse, record.history, budget)
    method = collapse.method(target)
    method.operator.check(layout)
    if method.refit is not None:
        method.refit.check(layout)
    collapse.check_target(record.history, target)
    return offline.planned(collapse, target)


def _target(cli: RecipeCLI, collapse: ProgressiveCollapse, done: MergeHistory, budget: Budget | None) -> int:
    if budget is None:
        if collapse.schedule is None:
            raise InputError(
                "How short? The recipe has no collapse.schedule: give --target-depth, --target-params, --target-size "
                "or --plan."
            )
        budget = Depth(collapse.schedule.target(done.teacher_depth))
    model = budgets.as_stored(cli.model.teacher_config)
    surgery.replay(model, done)
    target = budget.depth(model)
    assert target is not None
    return target
