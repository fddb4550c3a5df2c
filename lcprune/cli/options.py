"""The options that a command takes beside the settings of a recipe; checked before weights are loaded."""

import argparse
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import TypeAlias

import torch
from transformers import PreTrainedModel

from lcprune import models, weights
from lcprune.cli.arguments import CommandParser
from lcprune.cli.training import RecipeCLI
from lcprune.distillation.beforehand import say_if_slow
from lcprune.distillation.teacher import DTYPES, DtypeName, load
from lcprune.errors import InputError

Option: TypeAlias = "tuple[str, Callable[[str], object], str]"
"""Name, what makes its value of the text (`bool` = a flag without a value), and the line of help."""

DEVICE: Option = ("--device", str, "cpu, cuda or cuda:1; default: as trainer.accelerator says, cuda if there is one.")
"""Of every command that loads a model without training it."""
ALIKE = 0.8
"""From here on a name that is no option of the command counts as one misspelt, and not as a setting of the recipe."""


def dtype(text: str) -> Option:
    """The option --dtype of a command that loads a model.

    Args:
        text: What the command does in that type, and the default.
    """
    return "--dtype", str, f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}: {text}"


def split(
    command: str, usage: str, arguments: Sequence[str], *options: Option, about: str, examples: str
) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and what remains for the recipe's parser (--config, --data.path ...).

    Args:
        command: Its name.
        usage: What a user types behind it, without the recipe's settings.
        arguments: What was typed behind it.
        options: Those of the command.
        about: What the command does, in a sentence or two; lines as they are printed.
        examples: What --help ends with, printed as it stands.

    Raises:
        InputError: A value is not of its option's kind, or an option is misspelt.
    """
    usage = f"lcprune {command} {usage} [--model.KEY VALUE] [--data.KEY VALUE] ..."
    about = f"{about}\n\nEvery setting of the recipe can be given as an option, too: lcprune fit --help lists them."
    parser = CommandParser(command, about, examples, usage)
    for name, kind, text in options:
        if kind is bool:
            parser.add_argument(name, action="store_true", help=text)
        else:
            parser.add_argument(name, type=kind, help=text)
    own, rest = parser.parse_known_args(arguments)
    for given in (argument for argument in rest if argument.startswith("--")):
        if near := get_close_matches(given.partition("=")[0], [name for name, *_ in options], 1, ALIKE):
            parser.error(f"{given} is not an option, did you mean {near[0]}?")
    return own, rest


def check_loading(own: argparse.Namespace) -> None:
    """Refuses a device or dtype that cannot be had.

    Raises:
        InputError: --device or --dtype is unknown, or this machine has no such device.
    """
    if own.dtype is not None and own.dtype not in DTYPES:
        raise InputError(f"--dtype {own.dtype} must be one of {', '.join(DTYPES)}.")
    if own.device is None:
        return
    kind, _, number = own.device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
        raise InputError(f"--device {own.device} must be cpu, cuda, or cuda with a number such as cuda:1.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        there = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise InputError(
            f"--device {own.device} is not on this machine, where torch finds {', '.join(['cpu', *there])}: "
            "choose one of these, or leave --device out."
        )


def depth_of_teacher(cli: RecipeCLI) -> int:
    """Layers of the model that a command without training is about; raises InputError if there is nothing to merge."""
    if cli.model.student_folder is not None:
        raise InputError(
            f"model.student={str(cli.model.student_folder)!r} is where training begins; this command looks at "
            "model.teacher alone: leave model.student out, or name the folder as model.teacher."
        )
    depth = cli.model.history.teacher_depth
    weights.check(cli.model.teacher_name)
    if depth < 2:
        raise InputError(f"model.teacher={cli.model.teacher_name!r} has {depth} layer: to merge takes 2 or more.")
    return depth


def load_model(own: argparse.Namespace, cli: RecipeCLI) -> PreTrainedModel:
    """The recipe's teacher on its trainer's device, in the dtype that was asked for, else in the recipe's."""
    models.load_tokenizer(cli.model.teacher_name)  # text and export need it: a bad one is refused first
    dtype: DtypeName = own.dtype or cli.model.weights_dtype
    if dtype == "bfloat16":
        say_if_slow(cli.trainer.strategy.root_device, "--dtype bfloat16", "--dtype float32")
    return load(cli.model.teacher_name, dtype, cli.trainer.strategy.root_device)
