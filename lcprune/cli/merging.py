"""`collapse` and `score`: the recipe's planner and operator at once, without training."""

import json
from dataclasses import replace
from pathlib import Path

from lcprune import demo
from lcprune.cli import tables
from lcprune.cli.files import write_text
from lcprune.cli.quiet import quieten
from lcprune.cli.training import Parser, RecipeCLI, collapse_of
from lcprune.delivery.export import check_target, export
from lcprune.distillation.callbacks import ProgressiveCollapse
from lcprune.distillation.teacher import cast, load, stored_dtype
from lcprune.errors import InputError
from lcprune.merging import collapse
from lcprune.merging.calibration import Calibration
from lcprune.merging.criteria import AngularDistance, BlockInfluence, Criterion, OutputSimilarity, TrialPerplexity
from lcprune.merging.lineage import MergeHistory


def run(command: str, arguments: list[str]) -> None:
    """`collapse` or `score`."""
    quieten()
    (_collapse if command == "collapse" else _score)(arguments)


def _collapse(arguments: list[str]) -> None:
    own, recipe_arguments = _split(
        "lcprune collapse --config RECIPE.yaml --out FOLDER",
        arguments,
        ("--out", Path, "Folder for the shortened model."),
        ("--plan", Path, "Execute this plan (JSON, as written before) instead of making one."),
        ("--plan-only", bool, "Print the plan as a table, write it as JSON (--out FILE, default plan.json), stop."),
        ("--target-depth", int, "Number of layers wanted; default: where the recipe's schedule ends."),
    )
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
    model = load(cli.model.teacher_name, cli.model.weights_dtype, cli.trainer.strategy.root_device)
    if given is None:
        given = collapse.plan(
            model,
            cli.datamodule.calibration_batches(),
            target_depth=target,
            planner=callback.planner,
            operator=callback.operator,
        )
    history = replace(given, teacher=name)
    tables.plan(history)
    if own.plan_only:
        path = own.out or Path("plan.json")
        write_text(path, history.to_json())
        print(f"{path}: edit it and run `lcprune collapse ... --plan {path} --out FOLDER`")
        return
    collapse.execute(model, history)
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


def _score(arguments: list[str]) -> None:
    own, recipe_arguments = _split(
        "lcprune score --config RECIPE.yaml",
        arguments,
        ("--out", Path, "Also write the scores to this file, as JSON."),
    )
    cli = RecipeCLI(recipe_arguments, run=False)
    cli.model.history  # noqa: B018 - refuses an unknown model or family before its weights are loaded
    batches = cli.datamodule.calibration_batches()
    model = load(cli.model.teacher_name, cli.model.weights_dtype, cli.trainer.strategy.root_device)
    calibration = Calibration(model, batches)
    criteria: tuple[Criterion, ...] = (BlockInfluence(), AngularDistance(), OutputSimilarity(), TrialPerplexity())
    columns = {type(criterion).__name__: criterion.score(calibration) for criterion in criteria}
    tables.scores(columns)
    if own.out is not None:
        write_text(own.out, json.dumps(columns, indent=2) + "\n")
        print(f"scores: {own.out}")


def _split(usage: str, arguments: list[str], *options: tuple[str, type, str]):  # type: ignore[no-untyped-def]
    """Our own options, and what remains for the recipe's parser (--config, --data.path ...)."""
    import argparse

    class Own(argparse.ArgumentParser):
        error, _settings = Parser.error, Parser._settings

    parser = Own(usage=f"{usage} [--model.KEY VALUE] [--data.KEY VALUE] ...", allow_abbrev=False, add_help=False)
    parser.add_argument("-h", "--help", action="help", help="Show this; the recipe's own keys: lcprune fit --help.")
    for name, kind, text in options:
        if kind is bool:
            parser.add_argument(name, action="store_true", help=text)
        else:
            parser.add_argument(name, type=kind, help=text)
    return parser.parse_known_args(arguments)
