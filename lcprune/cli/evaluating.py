"""`evaluate`: measures a model beside its teacher, on tasks, on text, in what it writes, in speed and memory.

    names -> subjects -> texts, questions        looked over, nothing heavy yet
                      -> weights -> measurements -> table, evaluation.json, model card

The figures of the text are those of the run's own table where the model was made by a recipe (its recipe.yaml is found
by itself): same text, same dtypes, same precision. With --dtype, on another device or beside another version of torch
they may differ in the last digits. Everything else is measured with both models in one dtype.
"""

import argparse
import os
from pathlib import Path

from lcprune import __version__, files
from lcprune.cli import bars, heldout, options, recipes, side_by_side
from lcprune.cli.arguments import CommandParser
from lcprune.cli.measuring import Job, Known, Tasks, evaluated
from lcprune.cli.quiet import quieten
from lcprune.cli.subjects import Subject, look_at
from lcprune.delivery import choices, harness
from lcprune.delivery.card import with_evaluation
from lcprune.delivery.evaluate import Evaluation
from lcprune.distillation.teacher import DTYPES, DtypeName, stored_dtype
from lcprune.errors import InputError
from lcprune.files import check_file, write_text

FILE = "evaluation.json"
"""What the figures are called where --out says nothing."""
USAGE = "lcprune evaluate MODEL [MODEL ...] [options]"
EXAMPLES = """examples:
  lcprune evaluate runs/quickstart                              beside its teacher, on the run's held-out text
  lcprune evaluate short --text my.txt --task-folder tasks      tasks/*.jsonl with context, choices, label
  lcprune evaluate short --tasks arc_easy,piqa                  by lm-eval (pip install 'lcprune[eval]')
  lcprune evaluate demo:smollm2 --teacher none                  a model by itself"""


def run(command: str, arguments: list[str]) -> None:
    """`lcprune evaluate MODEL [MODEL ...]`."""
    own = _parser().parse_args(arguments)
    _check(own)
    quieten()
    subjects = [look_at(name) for name in own.models]
    teachers = [_teacher(own.teacher, subject) for subject in subjects]
    tasks = _tasks(own)
    jobs = [_job(own, subject, teacher) for subject, teacher in zip(subjects, teachers, strict=True)]
    known = Known()
    for job in jobs:
        with bars.shown():
            evaluation = evaluated(job, tasks, known)
        side_by_side.show(evaluation)
        write_text(job.out, evaluation.to_json())
        print(f"evaluation: {job.out}")
        if own.limit is None and own.out is None:  # others are figures for oneself, and no model is judged by them
            _tell_card(job, evaluation)


def _tell_card(job: Job, evaluation: Evaluation) -> None:
    """Puts the table into the model card of an export; a model that is not ours keeps its own."""
    card = Path(job.subject.model) / "README.md"
    if job.subject.history is None or not card.is_file() or not os.access(card.parent, os.W_OK):
        return
    header = side_by_side.headings(evaluation)
    blocks, tokens = (evaluation.settings[name] for name in ("blocks", "tokens"))
    amount = f"{blocks:,} block{'s' * (blocks != 1)}, {tokens:,} tokens"
    text = f"Measured with lcprune {__version__} on {job.text.source} ({amount}), in {job.dtype}."
    write_text(card, with_evaluation(card.read_text(encoding="utf-8"), [header, *side_by_side.rows(evaluation)], text))
    print(f"model card: {card}")


def _parser() -> CommandParser:
    parser = CommandParser("evaluate", str(__doc__).partition("\n")[0], EXAMPLES, USAGE)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="A run folder, a model's folder, or a model's name.")
    parser.add_argument(
        "--teacher",
        help="Model to compare with, or none; default: the one that the model's history.json names.",
    )
    parser.add_argument("--tasks", help="Comma-separated names: files of --task-folder, else tasks of lm-eval.")
    parser.add_argument(
        "--task-folder",
        type=Path,
        help="Folder of NAME.jsonl files (without --tasks, all of them are run) and of lm-eval's YAML files.",
    )
    parser.add_argument("--text", type=Path, help="Measure on all of this file, read as a recipe's data.path.")
    parser.add_argument("--config", type=Path, help="Measure on this recipe's held-out text; default: the model's own.")
    parser.add_argument(
        "--limit",
        type=int,
        help="Number of questions per task and of blocks of text, at most; the model card stays as it is.",
    )
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:1; default: what the recipe says, else cuda if there is one."
    )
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}: both models' weights; default: as the model is stored.")
    parser.add_argument(
        "--out", type=Path, help=f"JSON file; default: {FILE} in the run's or the model's folder, and the model card."
    )
    return parser


def _check(own: argparse.Namespace) -> None:
    """What can be known from the arguments alone."""
    options.check_loading(own)
    if own.limit is not None and own.limit < 1:
        raise InputError(f"--limit {own.limit} must be 1 or more; leave it out for all.")
    if own.text is not None and own.config is not None:
        raise InputError("--text and --config both name the text to measure on: give one of them.")
    if own.out is not None and len(own.models) > 1:
        raise InputError(f"--out names one file for {len(own.models)} models: leave it out, each has its own.")
    if own.out is not None:
        check_file("--out", own.out)
    if own.task_folder is not None and not own.task_folder.is_dir():
        raise InputError(
            f"--task-folder {own.task_folder} is not a folder: name one that holds NAME.jsonl or YAML files."
        )
    for option, path, way in (("--config", own.config, recipes.not_there), ("--text", own.text, files.not_there)):
        if path is not None and not path.is_file():
            raise InputError(f"{option} {path} {'is a folder: name a file' if path.is_dir() else way(path)}.")


def _teacher(asked: str | None, subject: Subject) -> str | None:
    """What a model is compared with, fit for it."""
    teacher = subject.teacher if asked is None else None if asked == "none" else asked
    if teacher is None:
        return None
    try:
        subject.check_teacher(teacher)
    except InputError as error:
        told = f"{subject.name} descends from {teacher!r}, and " if asked is None else "--teacher: "
        raise InputError(f"{told}{error} Or measure it by itself with --teacher none.") from error
    return teacher


def _tasks(own: argparse.Namespace) -> Tasks:
    """The questions, read; lm-eval's tasks, found."""
    folder: Path | None = own.task_folder
    files = {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    names = list(files) if own.tasks is None else [name.strip() for name in own.tasks.split(",") if name.strip()]
    if folder is not None and not names:
        raise InputError(f"--task-folder {folder} holds no NAME.jsonl, and --tasks names none of its YAML files.")
    mine = {name: choices.read(files[name], own.limit) for name in names if name in files}
    others = [name for name in names if name not in files]
    return Tasks(mine, harness.prepare(others, folder) if others else None, own.limit)


def _job(own: argparse.Namespace, subject: Subject, teacher: str | None) -> Job:
    """A model with its text."""
    recipe: Path | None = own.config or (subject.recipe if own.text is None else None)
    if recipe is not None:
        text = heldout.of_recipe(recipe, own.limit, own.device)
    else:
        text = heldout.of_file(own.text, subject.model, subject.config, own.limit, own.device)
    stored = str(stored_dtype(subject.config)).removeprefix("torch.")
    dtype: DtypeName = own.dtype or next((name for name in DTYPES if name == stored), DTYPES[0])
    # Models of the hub have no folder of their own: what is found of several must not lie in one file.
    apart = len(own.models) > 1 and not Path(subject.model).is_dir()
    out = own.out or subject.home / (f"{subject.name.replace('/', '--')}.{FILE}" if apart else FILE)
    check_file("--out", out)
    return Job(subject, teacher, text, dtype, own.dtype is not None, text.device, out)
