"""`collapse`: the recipe's planner and operator at once, without training."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from lcprune import models
from lcprune.cli import bars, budgets, options, streaming, tables
from lcprune.cli.machines import OneDevice
from lcprune.cli.quiet import quieten
from lcprune.cli.training import RecipeCLI, collapse_of
from lcprune.delivery.export import check_target, export
from lcprune.distillation.teacher import cast, stored_dtype
from lcprune.errors import InputError
from lcprune.files import check_file, write_text
from lcprune.merging import collapse, rounding
from lcprune.merging import refit as refits
from lcprune.merging.activity import KnownActivity
from lcprune.merging.budget import on_meta
from lcprune.merging.calibration import Batch
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.operators import from_spec

PLAN = Path("plan.json")
"""Where a plan goes unless --out says otherwise."""


def run(command: str, arguments: list[str]) -> None:
    """`lcprune collapse --config RECIPE.yaml`."""
    quieten()
    _collapse(arguments)


def _collapse(arguments: list[str]) -> None:
    own, recipe_arguments = options.split(
        "collapse",
        "--config RECIPE.yaml --out FOLDER",
        arguments,
        ("--out", Path, "Folder for the shortened model."),
        *budgets.OPTIONS,
        ("--plan", Path, "Execute this plan (JSON, as --plan-only writes it) instead of making one."),
        ("--plan-only", bool, f"Print the plan as a table, write it as JSON (--out FILE, default {PLAN}), and stop."),
        streaming.FLAG,
        options.DEVICE,
        options.dtype(
            "what the weights are held in while planning and merging; those that no merge and no refit changes are "
            "written as the original has them (you are told where they cannot be); default: model.dtype of the recipe."
        ),
        about="Shortens the recipe's teacher without training: plans, merges, refits if the recipe asks, exports.",
        examples=budgets.EXAMPLES,
    )
    options.check_loading(own)
    given = MergeHistory.load(own.plan) if own.plan is not None else None
    if own.plan_only and given is not None:
        raise InputError("--plan-only makes a plan and --plan executes one: give one of them.")
    budget = budgets.asked(own)
    if own.out is None and not own.plan_only:
        raise InputError("--out is missing: name the folder for the shortened model, or ask for --plan-only.")
    if own.plan_only:
        own.out = own.out or PLAN
        check_file("--out", own.out)
    else:
        check_target(own.out)
    cli = OneDevice(recipe_arguments, own.device)
    if not own.plan_only:
        check_target(own.out, cli.sources)
    name = models.public_name(cli.model.teacher_name)
    if given is not None and given.teacher and models.located(given.teacher) != name:
        raise InputError(f"--plan {own.plan} was made for {given.teacher!r}, model.teacher is {name!r}: name that one.")
    if given is not None:
        collapse.check_plan(on_meta(cli.model.teacher_config), given)
        if not given.steps:
            raise InputError(f"--plan {own.plan} merges nothing: give it steps, or leave --plan out to have one made.")
        _say_what_is_passed_over(own.plan, given, cli)
    goal = budgets.goal(budget, cli) if given is None else None
    if own.stream:
        streaming.collapse(own, cli, given, goal)
        return
    stored = None if own.plan_only else streaming.originals(own, cli)
    model = options.load_model(own, cli)
    known = KnownActivity()
    if given is None:
        assert goal is not None
        given = _plan(model, cli, goal, known)
    history = replace(given, teacher=name)
    tables.plan(history)
    if own.plan_only:
        write_text(own.out, history.to_json())
        print(budgets.outcome(history, cli, budget))
        print(f"{own.out}: edit it and run `lcprune collapse ... --plan {own.out} --out FOLDER`")
        return
    with bars.shown():
        collapse.execute(model, history, _text(history, cli), known=known)
    if stored is not None:
        rounding.restore(model, stored, history.lineage)
    _deliver(model, history, cli, own.out)
    print(budgets.outcome(history, cli, budget, own.out))
    print(f"student: {own.out}")


def _say_what_is_passed_over(plan: Path, given: MergeHistory, cli: RecipeCLI) -> None:
    """Tells of a refit and an operator of the recipe that a plan, which has its own, does not run."""
    callback, passed_over = collapse_of(cli), []
    operators = [from_spec(step.operator) for step in given.steps]
    if cli.config.get("collapse.operator") is not None and callback.operator not in operators:
        names = ", ".join(dict.fromkeys(type(operator).__name__ for operator in operators))
        passed_over.append(f"it merges with {names}, and the recipe's {type(callback.operator).__name__} is not run")
    planned = [refits.from_spec(step.refit) for step in given.steps if step.refit is not None]
    if callback.refit is not None and callback.refit not in planned:
        what = f"its refit is {type(planned[-1]).__name__}" if planned else "it has no refit"
        passed_over.append(f"{what}, and the recipe's {type(callback.refit).__name__} is not run")
    if passed_over:
        print(f"lcprune: --plan {plan}: {'; '.join(passed_over)}: put it into the plan's steps.", file=sys.stderr)


def _plan(model: PreTrainedModel, cli: RecipeCLI, goal: budgets.Goal, known: KnownActivity) -> MergeHistory:
    callback, batches = collapse_of(cli), cli.datamodule.calibration_batches()
    with bars.shown():
        history = collapse.plan(
            model,
            batches,
            target_depth=goal.depth,
            max_perplexity_ratio=goal.max_perplexity_ratio,
            planner=callback.planner,
            operator=callback.operator,
            refit=callback.refit,
            known=known,
        )
    goal.check_reached(callback.planner, history)
    return history


def _text(history: MergeHistory, cli: RecipeCLI) -> Sequence[Batch]:
    """What its steps look at."""
    needs_text = any(step.refit is not None or from_spec(step.operator).needs_activity for step in history.steps)
    return cli.datamodule.calibration_batches() if needs_text else ()


def _deliver(model: PreTrainedModel, history: MergeHistory, cli: RecipeCLI, out: Path) -> None:
    """Exports, in the dtype of the original."""
    cast(model, stored_dtype(cli.model.teacher_config))
    export(
        model,
        out,
        tokenizer=cli.tokenizer,
        history=history,
        recipe=cli.recipe_text,
        license=models.license_of(cli.model.teacher_name),
    )
