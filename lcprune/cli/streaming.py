"""`collapse --stream`: for a model that does not fit into memory; its weights are read and written layer by layer."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from lcprune import models, weights
from lcprune.cli import bars, budgets, tables
from lcprune.cli.training import RecipeCLI, collapse_of
from lcprune.delivery.export import export_stream
from lcprune.distillation.callbacks import ProgressiveCollapse
from lcprune.distillation.teacher import stored_dtype
from lcprune.errors import InputError, reason
from lcprune.files import write_text
from lcprune.merging import rounding
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.streaming import (
    NotByLayers,
    StoredModel,
    StreamedCalibration,
    check_operator,
    check_planner,
    merged_tensors,
    student_of,
)
from lcprune.weights import INDEX, ONE_FILE

FLAG = (
    "--stream",
    bool,
    "Read and write the weights layer by layer: takes memory for a layer and the text's states.",
)
"""The option of `collapse`."""


def collapse(own: argparse.Namespace, cli: RecipeCLI, given: MergeHistory | None, goal: budgets.Goal | None) -> None:
    """Plans and executes, or one of them, as `collapse` does with the whole model.

    Args:
        own: The command's options.
        cli: The recipe.
        given: The plan to execute; None = make one.
        goal: What a plan that is made must keep to.
    """
    callback = collapse_of(cli)
    if given is None:
        check_planner(callback.planner)
        check_operator(callback.operator)
        _check_refit(callback)
    name = cli.model.teacher_name
    models.read_generation_config(name)  # it goes with the student: a bad one is refused first
    stored = StoredModel(
        cli.model.teacher_config,
        weights_folder(name),
        dtype=getattr(torch, own.dtype or cli.model.weights_dtype),
        device=cli.trainer.strategy.root_device,
    )
    if given is None:
        assert goal is not None
        given = _plan(stored, cli, goal)
    history = replace(given, teacher=models.public_name(name))
    tables.plan(history)
    if own.plan_only:
        write_text(own.out, history.to_json())
        print(budgets.outcome(history, cli))
        print(f"{own.out}: edit it and run `lcprune collapse ... --stream --plan {own.out} --out FOLDER`")
        return
    # What is written is read in no fewer bits than it is stored in, whatever the plan was made in.
    exact = torch.promote_types(stored.dtype, stored_dtype(stored.config))
    if exact != stored.dtype:
        stored = StoredModel(stored.config, stored.shards.folder, dtype=exact, device=stored.device)
    with bars.shown():
        _export(stored, history, own.out, cli)
    print(budgets.outcome(history, cli, folder=own.out))
    print(f"student: {own.out}")


def _plan(stored: StoredModel, cli: RecipeCLI, goal: budgets.Goal) -> MergeHistory:
    assert goal.depth is not None
    callback = collapse_of(cli)
    calibration = StreamedCalibration(stored.model, cli.datamodule.calibration_batches(), stored=stored)
    with bars.shown():
        steps = callback.planner.plan(calibration, callback.operator, goal.depth)
    history = MergeHistory(stored.depth, steps)
    goal.check_reached(callback.planner, history)
    return history


def weights_folder(name: str) -> Path:
    """The folder of a model's safetensors files; those of a model on the hub are fetched into its cache.

    Raises:
        InputError: There is no such model, it cannot be fetched, or its weights are not those that were exported.
    """
    weights.check(name)
    place = Path(models.resolve(name))
    if place.is_dir():
        return place
    try:
        return Path(snapshot_download(name, allow_patterns=[ONE_FILE, "model-*-of-*.safetensors", INDEX]))
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise InputError(
            f"The weights of model.teacher={name!r} cannot be fetched ({reason(error)}): check the name and "
            "the network, or name a local folder written by save_pretrained."
        ) from error


def originals(own: argparse.Namespace, cli: RecipeCLI) -> StoredModel | None:
    """The original's own weights, for a student that is merged in fewer bits; None where no bits are lost.

    None, too, where the files hold the weights in another arrangement or by other names than the model does (experts,
    GPT-NeoX with a head of its own): then it says, before anything is loaded, that all of the student will be rounded.
    """
    loaded = getattr(torch, own.dtype or cli.model.weights_dtype)
    exact = stored_dtype(cli.model.teacher_config)
    if not rounding.loses_bits(loaded, exact):
        return None
    try:
        return StoredModel(cli.model.teacher_config, weights_folder(cli.model.teacher_name), dtype=exact)
    except InputError as error:
        why = f"{error.reason}." if isinstance(error, NotByLayers) else str(error)
        print(
            f"lcprune: all weights of the student will be rounded to {loaded}, without --dtype none is: {why}",
            file=sys.stderr,
        )
        return None


def _check_refit(callback: ProgressiveCollapse) -> None:
    if callback.refit is not None:
        raise InputError(
            f"collapse.refit={callback.refit} needs the merged model in memory: set it to null, or leave --stream out."
        )


def _export(stored: StoredModel, history: MergeHistory, out: Path, cli: RecipeCLI) -> None:
    name = cli.model.teacher_name
    student = student_of(stored, history, stored_dtype(cli.model.teacher_config))
    if (generation := models.read_generation_config(name)) is not None:
        student.generation_config = generation
    export_stream(
        student,
        merged_tensors(stored, history),
        out,
        tokenizer=cli.tokenizer,
        history=history,
        recipe=cli.recipe_text,
        license=models.license_of(name),
    )
