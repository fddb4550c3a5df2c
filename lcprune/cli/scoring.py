"""`score`: every criterion over every layer, as a table, as JSON and as a picture."""

import json
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from lcprune import api, models
from lcprune.cli import bars, options, tables
from lcprune.cli.machines import OneDevice
from lcprune.cli.quiet import quieten
from lcprune.cli.training import RecipeCLI
from lcprune.delivery import pictures
from lcprune.errors import InputError
from lcprune.files import check_file, write_bytes, write_text

EXAMPLES = """an example:
  lcprune score --config recipes/shortgpt.yaml --data.path my.jsonl --out scores
"""


def run(command: str, arguments: list[str]) -> None:
    """`lcprune score --config RECIPE.yaml`."""
    quieten()
    own, recipe_arguments = options.split(
        command,
        "--config RECIPE.yaml",
        arguments,
        ("--out", Path, "Folder for scores.json and scores.png, or a .json file for the scores without a picture."),
        options.DEVICE,
        options.dtype("what the model is held in and computes in; default: model.dtype of the recipe."),
        about="Scores every layer of the teacher by every criterion; lower = safer to merge. Merges nothing.",
        examples=EXAMPLES,
    )
    options.check_loading(own)
    table, picture = _targets(own.out)
    cli = OneDevice(recipe_arguments, own.device)
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
        check_file("--out", out)
        return out, None
    if out.suffix == ".png" or (out.exists() and not out.is_dir()):
        raise InputError(f"--out {out} must be a folder, for scores.json and scores.png, or a file ending in .json.")
    check_file("--out", out / "scores.json")
    check_file("--out", out / "scores.png")
    return out / "scores.json", out / "scores.png"


def _measured(model: PreTrainedModel, cli: RecipeCLI) -> pictures.Scores:
    """Everything there is to score, on the recipe's calibration text."""
    batches = cli.datamodule.calibration_batches()
    with bars.shown():
        scores = api.score(model, batches)
    return replace(scores, model=models.public_name(cli.model.teacher_name))
