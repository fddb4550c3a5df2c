"""`score`: every criterion over every layer, as a table."""

import json
from pathlib import Path

from lcprune.cli import options, tables
from lcprune.cli.files import write_text
from lcprune.cli.quiet import quieten
from lcprune.cli.training import RecipeCLI
from lcprune.merging.calibration import Calibration
from lcprune.merging.criteria import AngularDistance, BlockInfluence, Criterion, OutputSimilarity, TrialPerplexity


def run(command: str, arguments: list[str]) -> None:
    """`lcprune score --config RECIPE.yaml`."""
    quieten()
    own, recipe_arguments = options.split(
        f"lcprune {command} --config RECIPE.yaml",
        arguments,
        ("--out", Path, "Also write the scores to this file, as JSON."),
        *options.LOADING,
    )
    options.check_loading(own)
    cli = RecipeCLI(recipe_arguments, run=False)
    cli.model.history  # noqa: B018 - refuses an unknown model or family before its weights are loaded
    batches = cli.datamodule.calibration_batches()
    calibration = Calibration(options.load_model(own, cli), batches)
    criteria: tuple[Criterion, ...] = (BlockInfluence(), AngularDistance(), OutputSimilarity(), TrialPerplexity())
    columns = {type(criterion).__name__: criterion.score(calibration) for criterion in criteria}
    tables.scores(columns)
    if own.out is not None:
        write_text(own.out, json.dumps(columns, indent=2) + "\n")
        print(f"scores: {own.out}")
