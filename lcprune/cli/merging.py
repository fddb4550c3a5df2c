"""`collapse`: the recipe's planner and operator at once, without training."""

from dataclasses import replace
from pathlib import Path

from lcprune import demo
from lcprune.cli import options, streaming, tables
from lcprune.cli.files import write_text
from lcprune.cli.quiet import quieten
from lcprune.cli.training import RecipeCLI, collapse_of
from lcprune.delivery.export import check_target, export
from lcprune.distillation.callbacks import ProgressiveCollapse
from lcprune.distillation.teacher import cast, stored_dtype
from lcprune.errors import InputError
from lcprune.merging import collapse
from lcprune.merging.architectures import layout_of
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.operators import from_spec


def run(command: str, arguments: list[str]) -> None:
    """`lcprune collapse --config RECIPE.yaml`."""
    quieten()
    _collapse(arguments)


def _collapse(arguments: list[str]) -> None:
    own, recipe_arguments = options.split(
        "lcprune collapse --config RECIPE.yaml --out FOLDER",
        arguments,
        ("--out", Path, "Folder for the shortened model."),
        ("--plan", Path, "Execute this plan (JSON, as written before) instead of making one."),
        ("--plan-only", bool, "Print the plan as a table, write it as JSON (--out FILE, default plan.json), stop."),
        ("--target-depth", int, "Number of layers wanted; default: where the recipe's schedule ends."),
        streaming.FLAG,
        *options.LOADING,
    )
    options.check_loading(own)
    given = MergeHistory.load(own.plan) if own.plan is not None else None
    if own.plan_only and given is not None:
        raise InputError("--plan-only makes a plan and --plan executes one: give one of them.")
    if given is not None and own.target_depth is not None:
        raise InputError("--plan says what merges already, --target-depth means nothing beside it: give one of them.")
    if own.out is None and not own.plan_only:
        raise InputError("--out is missing: name the folder for the shortened model, or ask for --plan-only.")
    if not own.plan_only:
        check_target(own.out)
    cli = RecipeCLI(recipe_arguments, run=False)
    callback = collapse_of(cli)
    depth = cli.model.history.teacher_depth
    name = demo.public_name(cli.model.teacher_name)
    if given is not None and given.teacher not in ("", name):
        raise InputError(f"--plan {own.plan} was made for {given.teacher!r}, model.teacher is {name!r}: name that one.")
    target = _target(own.target_depth, callback, depth) if given is None else given.depth
    if given is None:
        collapse.check_target_depth(target, depth)
        callback.planner.check(depth, target)
        callback.operator.check(layout_of(cli.model.teacher_config))
        if callback.refit is not None:
            callback.refit.check(layout_of(cli.model.teacher_config))
    if own.stream:
        streaming.collapse(own, cli, given, target)
        return
    model = options.load_model(own, cli)
    if given is None:
        given = collapse.plan(
            model,
            cli.datamodule.calibration_batches(),
            target_depth=target,
            planner=callback.planner,
            operator=callback.operator,
            refit=callback.refit,
        )
    history = replace(given, teacher=name)
    tables.plan(history)
    if own.plan_only:
        path = own.out or Path("plan.json")
        write_text(path, history.to_json())
        print(f"{path}: edit it and run `lcprune collapse ... --plan {path} --out FOLDER`")
        return
    needs_text = any(step.refit is not None or from_spec(step.operator).needs_activity for step in history.steps)
    collapse.execute(model, history, cli.datamodule.calibration_batches() if needs_text else ())
    cast(model, stored_dtype(cli.model.teacher_config))
    tokenizer = demo.load_tokenizer(cli.model.teacher_name)
    export(
        model,
        own.out,
        tokenizer=tokenizer,
        history=history,
        recipe=cli.recipe_text,
        license=demo.license_of(cli.model.teacher_name),
    )
    print(f"student: {own.out}")


def _target(asked: int | None, callback: ProgressiveCollapse, depth: int) -> int:
    if asked is not None:
        return asked
    if callback.schedule is None:
        raise InputError("--target-depth is missing, and the recipe has no collapse.schedule: give one of them.")
    return callback.schedule.target(depth)
