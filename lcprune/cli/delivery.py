"""`export`: turns a checkpoint into a Hugging Face folder; uploads a folder to the hub, or makes a GGUF file of it.

What could fail at the end (a name, a login, a converter) is looked at before anything is read.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from lcprune import models, weights
from lcprune.cli.arguments import CommandParser
from lcprune.cli.quiet import quieten
from lcprune.cli.subjects import look_at
from lcprune.data.chat import with_template
from lcprune.delivery import gguf, hub
from lcprune.delivery.export import RECIPE, check_target, export
from lcprune.delivery.runs import TEMPLATE
from lcprune.distillation.checkpoint import load_student, read
from lcprune.distillation.teacher import cast, stored_dtype
from lcprune.errors import InputError

USAGE = """lcprune export CHECKPOINT --out FOLDER [--teacher NAME] [--push-to-hub NAME] [--gguf FILE]
       lcprune export FOLDER [--push-to-hub NAME] [--gguf FILE]"""
EXAMPLES = """examples:
  lcprune export runs/x/checkpoints/last.ckpt --out short
  lcprune export runs/x --push-to-hub me/short                  the student of a run; a new repository is private
  lcprune export short --gguf short-q8_0.gguf --gguf-type q8_0  for llama.cpp, by its own converter"""


def run(command: str, arguments: list[str]) -> None:
    """`lcprune export SOURCE`."""
    own = _parser().parse_args(arguments)
    _check(own)
    quieten()
    folder = _exported(own.source, own.out, own.teacher) if own.out is not None else _whole(own.source)
    if own.gguf is not None:
        gguf.convert(folder, own.gguf, own.gguf_type)
        print(f"gguf: {own.gguf}")
    if own.push_to_hub is not None:
        _say_what_is_told(folder)
        print(f"hub: {hub.push(folder, own.push_to_hub)}")


def _say_what_is_told(folder: Path) -> None:
    """Warns of paths of this machine that others will read."""
    if told := hub.local_paths(folder):
        print(
            f"lcprune: {', '.join(told)} go to the hub as they are and name places on this machine, such as "
            f"{next(iter(told.values()))}: delete them there before you make the repository public; to load the model "
            "nobody needs them.",
            file=sys.stderr,
        )


def _parser() -> CommandParser:
    parser = CommandParser("export", str(__doc__).partition("\n")[0], EXAMPLES, USAGE)
    parser.add_argument(
        "source", type=Path, help="A .ckpt that lcprune fit wrote, an exported folder, or a run folder."
    )
    parser.add_argument("--out", type=Path, help="Folder for the student in the checkpoint.")
    parser.add_argument("--teacher", help="Where the checkpoint's teacher is now; default: where it was.")
    parser.add_argument("--push-to-hub", metavar="NAME", help="Upload the folder as owner/name.")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="Make a .gguf file of the folder.")
    parser.add_argument("--gguf-type", default=gguf.TYPES[0], help=f"Weight type in the file: {', '.join(gguf.TYPES)}.")
    return parser


def _check(own: argparse.Namespace) -> None:
    """Everything that can be known before anything is read."""
    if own.source.is_dir() and own.out is not None:
        raise InputError(f"{own.source} is a folder already, --out is for the student of a checkpoint: drop it.")
    if own.source.is_dir() and own.gguf is None and own.push_to_hub is None:
        raise InputError(
            f"{own.source} is a folder already: say what becomes of it, --push-to-hub NAME or --gguf FILE."
        )
    if not own.source.is_dir() and own.out is None:
        raise InputError(
            f"--out is missing, and {own.source} is no folder: name one for the student of this checkpoint."
        )
    if own.gguf is None and own.gguf_type != gguf.TYPES[0]:
        raise InputError(
            f"--gguf-type {own.gguf_type} belongs to --gguf FILE, which is not given: give it or drop this."
        )
    if own.teacher is not None and own.out is None:
        raise InputError(f"--teacher {own.teacher} is for the student of a checkpoint, {own.source} is whole: drop it.")
    if own.out is not None:
        check_target(own.out)
    if own.gguf is not None:
        gguf.check(own.gguf, own.gguf_type)
    if own.push_to_hub is not None:
        hub.check(own.push_to_hub)


def _exported(checkpoint: Path, out: Path, moved: str | None) -> Path:
    """The student of a checkpoint as a folder."""
    recipe, template = (_kept(checkpoint, name) for name in (RECIPE, TEMPLATE))
    teacher = models.located(moved or read(checkpoint).history.teacher)
    check_target(out, {"the checkpoint's teacher": [teacher]})
    try:
        config = weights.config_of(teacher)
    except InputError as error:
        raise InputError(f"The teacher of {checkpoint}: {error} If it has moved, say where to: --teacher.") from error
    student, record = load_student(checkpoint, teacher)
    cast(student, stored_dtype(config))
    export(
        student,
        out,
        tokenizer=with_template(models.load_tokenizer(teacher), template),
        history=replace(record.history, teacher=models.public_name(teacher)),
        recipe=recipe,
        license=models.license_of(teacher),
    )
    print(f"student: {out}")
    return out


def _kept(checkpoint: Path, name: str) -> str | None:
    """A text that a run keeps in its folder, above that of its checkpoints."""
    file = checkpoint.absolute().parent.parent / name
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _whole(source: Path) -> Path:
    """The model in a folder or a run, with the weights that were exported."""
    subject = look_at(str(source))
    weights.check(subject.model, "lcprune export")
    return Path(subject.model)
