"""`export`: a checkpoint becomes a Hugging Face folder."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

from lcprune import demo
from lcprune.cli.quiet import quieten
from lcprune.delivery.export import check_target, export
from lcprune.distillation.checkpoint import load_student
from lcprune.errors import InputError

EXAMPLES = """an example:
  lcprune export runs/progressive/checkpoints/last.ckpt --out short
"""


def run(command: str, arguments: list[str]) -> None:
    """`lcprune export CHECKPOINT --out FOLDER`."""
    parser = _Parser(
        prog="lcprune export",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="A .ckpt file that lcprune fit wrote.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the student.")
    own = parser.parse_args(arguments)
    check_target(own.out)
    quieten()
    student, record = load_student(own.checkpoint)
    recipe = own.checkpoint.parent.parent / "recipe.yaml"
    export(
        student,
        own.out,
        tokenizer=demo.load_tokenizer(record.history.teacher),
        history=replace(record.history, teacher=demo.public_name(record.history.teacher)),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        license=demo.license_of(record.history.teacher),
    )
    print(f"student: {own.out}")


class _Parser(ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(f"lcprune export: {message}.")
