"""`cache`: the teacher runs once over the recipe's training text, and `fit` looks up what it says."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lcprune.amounts import size
from lcprune.cli import bars, options
from lcprune.cli.machines import OneDevice
from lcprune.cli.quiet import quieten
from lcprune.cli.training import RecipeCLI, collapse_of
from lcprune.distillation import cache
from lcprune.distillation.fill import Filling, different, origin_of
from lcprune.distillation.objectives import states_of_run
from lcprune.distillation.pair import Storage, storages
from lcprune.distillation.teacher import Teacher, load
from lcprune.errors import InputError

TOP_K = 128
"""How many tokens are kept unless another number is asked for."""
EXAMPLES = """an example:
  lcprune cache --config recipes/best.yaml --out teacher/
  lcprune fit --config recipes/best.yaml --model.teacher_cache teacher/
"""


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layer numbers, write it like 3,7") from None


@dataclass(frozen=True)
class _Job:
    """What is to be computed by what."""

    name: str
    storage: Storage
    device: torch.device
    blocks: Tensor
    filling: Filling


def run(command: str, arguments: list[str]) -> None:
    """`lcprune cache --config RECIPE.yaml --out FOLDER`."""
    quieten()
    own, recipe_arguments = options.split(
        command,
        "--config RECIPE.yaml --out FOLDER",
        arguments,
        ("--out", Path, "Folder for the cache; default: the recipe's model.teacher_cache."),
        ("--top-k", int, f"How many of the likeliest tokens are kept for every token of the text; default: {TOP_K}."),
        ("--states", bool, "Keep the residual stream too, where the recipe's Boundary and Local need it."),
        (
            "--layers",
            _layers,
            "Keep the residual stream behind these teacher layers, such as 3,7 (beside those of --states).",
        ),
        options.DEVICE,
        options.dtype("what the teacher computes in; default: as in fit."),
        about="Runs the teacher once over the recipe's training text and stores what it says, for fit to look up.",
        examples=EXAMPLES,
    )
    options.check_loading(own)
    job = _job(own, OneDevice(recipe_arguments, own.device))
    _fill(job)


def _job(own: argparse.Namespace, cli: RecipeCLI) -> _Job:
    """Everything but the weights, checked."""
    out = own.out or cli.model.teacher_cache
    if out is None:
        raise InputError("--out is missing: name the folder for the cache, or set model.teacher_cache in the recipe.")
    cache.check_levels([phase.objective for phase in cli.model.phases])
    top_k = _top_k(own.top_k, cli.model.teacher_config)
    layers = _states(own, cli)
    storage = _storage(own, cli)
    blocks = different(cli.datamodule.training_blocks())
    origin = origin_of(
        cli.model.teacher_name,
        blocks,
        dtype=storage.dtype if storage.packed is None else f"{storage.packed} in {storage.dtype}",
        batch_size=cli.datamodule.batch_size,
        top_k=top_k,
        layers=layers,
    )
    hidden = cli.model.teacher_config.get_text_config().hidden_size
    device = cli.trainer.strategy.root_device
    return _Job(cli.model.teacher_name, storage, device, blocks, Filling(out, origin, hidden))


def _fill(job: _Job) -> None:
    filling, origin = job.filling, job.filling.origin
    kept = f"the likeliest {origin.top_k} tokens"
    if origin.layers:
        kept += f" and the states of layers {', '.join(map(str, origin.layers))}"
    tokens = origin.blocks * origin.block_size
    print(f"{filling.folder}: {kept} at {tokens:,} places will take {size(filling.bytes)}", file=sys.stderr)
    if filling.blocks_left < origin.blocks:
        print(f"{origin.blocks - filling.blocks_left} of {origin.blocks} blocks are there already", file=sys.stderr)
    if filling.blocks_left:
        teacher = Teacher(load(job.name, job.storage.dtype, job.device, job.storage.packed))
        with bars.shown():
            filling.run(teacher, job.blocks)
    print(
        f"cache: {filling.folder}, {origin.blocks} blocks of {origin.block_size} tokens; the likeliest {origin.top_k} "
        f"tokens have {1 - filling.manifest.tail:.2%} of the teacher's probability"
    )


def _top_k(given: int | None, config: PretrainedConfig) -> int:
    vocabulary = config.get_text_config().vocab_size
    top_k = min(TOP_K, vocabulary) if given is None else given
    if not 1 <= top_k <= vocabulary:
        raise InputError(f"--top-k {top_k} must lie between 1 and the vocabulary's {vocabulary} tokens.")
    return top_k


def _states(own: argparse.Namespace, cli: RecipeCLI) -> tuple[int, ...]:
    """Behind which teacher layers the stream is kept."""
    depth = cli.model.history.teacher_depth
    named = own.layers or ()
    wrong = [layer for layer in named if not 0 <= layer < depth]
    if wrong:
        raise InputError(f"--layers {wrong[0]} does not exist, the teacher has layers 0 to {depth - 1}.")
    if not own.states:
        return named
    levels = [phase.objective for phase in cli.model.phases]
    if not states_of_run(levels, None, depth):
        raise InputError("--states: the recipe has neither Boundary nor Local, which need them: leave --states out.")
    callback = collapse_of(cli)
    lineages = callback.foresee(cli.model)
    if lineages is None:
        raise InputError(
            f"--states: which layers {type(callback.planner).__name__} will merge is not known before it has planned: "
            "name the teacher's layers with --layers instead, or the merges in a FixedPlan (`lcprune collapse "
            "--plan-only` prints them)."
        )
    return tuple(sorted({*named, *states_of_run(levels, lineages, depth)}))


def _storage(own: argparse.Namespace, cli: RecipeCLI) -> Storage:
    """How `fit` would hold the teacher, or in the dtype asked for."""
    model = cli.model
    return storages(model.weights_dtype, own.dtype or model.teacher_dtype, model.lora, str(cli.trainer.precision))[1]
