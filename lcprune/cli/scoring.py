"""`score`: every criterion over every layer, as a table, as JSON and as a picture."""

import json
from pathlib import Path

from transformers import PreTrainedModel

from lcprune import demo
from lcprune.cli import bars, options, tables
from lcprune.cli.quiet import quieten
from lcprune.cli.training import RecipeCLI
from lcprune.delivery import pictures
from lcprune.errors import InputError
from lcprune.files import write_bytes, write_text
from lcprune.merging.calibration import Calibration
from lcprune.merging.criteria import (
    AngularDistance,
    BlockInfluence,
    Criterion,
    OutputSimilarity,
    TrialPerplexity,
    score_all,
)
from lcprune.merging.gradients import Magnitude, Taylor
from lcprune.merging.heatmaps import state_cosines, weight_distances

CRITERIA: tuple[Criterion, ...] = (
    BlockInfluence(),
    AngularDistance(),
    AngularDistance(span=2),
    OutputSimilarity(),
    TrialPerplexity(),
    Magnitude(),
    Taylor(),
)
"""Every criterion there is; the angle over two layers is CoMe's score of a pair."""


def run(command: str, arguments: list[str]) -> None:
    """`lcprune score --config RECIPE.yaml`."""
    quieten()
    own, recipe_arguments = options.split(
        f"lcprune {command} --config RECIPE.yaml",
        arguments,
        ("--out", Path, "Folder for scores.json and scores.png, or a .json file for the scores without a picture."),
        *options.LOADING,
    )
    options.check_loading(own)
    table, picture = _targets(own.out)
    cli = RecipeCLI(recipe_arguments, run=False)
    options.depth_of_teacher(cli)
    missing = None if picture is None else pictures.missing()
    if missing:
        print(f"{picture} will not be drawn: {missing}")
    scores = _measured(options.load_model(own, cli), cli)
    tables.scores(scores.criteria)
    if table is not None:
        write_text(table, json.dumps(scores.to_dict(), indent=2) + "\n")
        print(f"scores: {table}")
    if picture is not None and not missing:
        write_bytes(picture, pictures.draw_scores(scores))
        print(f"picture: {picture}")


def _targets(out: Path | None) -> tuple[Path | None, Path | None]:
    """Where the JSON and the picture go; None = nowhere."""
    if out is None:
        return None, None
    if out.suffix == ".json" and not out.is_dir():
        return out, None
    if out.suffix == ".png" or (out.exists() and not out.is_dir()):
        raise InputError(f"--out {out} must be a folder, for scores.json and scores.png, or a file ending in .json.")
    return out / "scores.json", out / "scores.png"


def _measured(model: PreTrainedModel, cli: RecipeCLI) -> pictures.Scores:
    """Everything there is to score, on the recipe's calibration text."""
    calibration = Calibration(model, cli.datamodule.calibration_batches())
    with bars.shown():
        tokens = calibration.stats(1, 2).tokens  # one pass for all criteria that look at the stream
        cosines = state_cosines(model, calibration.batches).tolist()
        distances = weight_distances(model)
        columns = score_all(CRITERIA, calibration)
    return pictures.Scores(
        model=demo.public_name(cli.model.teacher_name),
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=tokens,
        criteria=dict(zip(map(_name, CRITERIA), columns, strict=True)),
        weights=distances,
        cosines=tuple(map(tuple, cosines)),
    )


def _name(criterion: Criterion) -> str:
    """The class, and the arguments where they are not the defaults."""
    kind = type(criterion)
    return kind.__name__ if criterion == kind() else repr(criterion)
