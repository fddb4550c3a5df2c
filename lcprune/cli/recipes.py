"""`recipes`: what this package brings, and a copy of it to edit.

    recipes/NAME.yaml             a method; its header says what, from where, with which outcome, and the command
    recipes/models/NAME.yaml      an overlay with the settings of a model, given after a method's recipe

In a checkout they lie in `recipes/`; a wheel has them inside the package. Imports nothing heavy.
"""

import re
from difflib import get_close_matches
from pathlib import Path

from rich.console import Console
from rich.table import Table

import lcprune
from lcprune import files
from lcprune.cli.arguments import CommandParser
from lcprune.errors import InputError

MODELS = "models"
"""The folder of the overlays, inside that of the recipes."""
EXAMPLES = """examples:
  lcprune recipes                                      # what there is
  lcprune recipes copy quickstart                      # quickstart.yaml in this folder
  lcprune recipes copy llama-3.2-1b recipes/models     # into another folder, or to a file of another name
"""


def run(command: str, arguments: list[str]) -> None:
    """`lcprune recipes` and `lcprune recipes copy NAME [TARGET]`."""
    parser = CommandParser(command, "Lists the recipes that lcprune brings, or copies one.", EXAMPLES)
    parser.add_argument("action", nargs="?", choices=("list", "copy"), default="list", help="list is the default")
    parser.add_argument("name", nargs="?", help="which recipe to copy, as the list calls it")
    parser.add_argument("target", nargs="?", type=Path, help="folder or file for it; default: its own name, here")
    own = parser.parse_args(arguments)
    if own.action == "list":
        if own.name is not None:
            raise InputError(f"lcprune recipes list takes nothing more, {own.name!r} is left over: leave it out.")
        _list()
    elif own.name is None:
        raise InputError("lcprune recipes copy needs the name of a recipe: `lcprune recipes` lists them.")
    else:
        path = copy(own.name, own.target)
        print(f"recipe: {path}")


def known() -> dict[str, Path]:
    """Every recipe and overlay by name, methods first."""
    folder = _folder()
    found = [*sorted(folder.glob("*.yaml")), *sorted((folder / MODELS).glob("*.yaml"))]
    return {file.stem: file for file in found}


def copy(name: str, target: Path | None = None) -> Path:
    """Copies a recipe; returns where to.

    Args:
        name: As `known` has it; with `.yaml` and `models/` if you like.
        target: A folder, or a file that does not exist yet; default: its own name in the current folder.

    Raises:
        InputError: There is no such recipe, or there is a file already.
    """
    source = _named(name)
    place = Path() if target is None else target.expanduser()
    path = place if place.suffix in (".yaml", ".yml") else place / source.name
    if path.exists():
        raise InputError(f"{path} exists already and is left as it is: remove it, or name another file.")
    files.check_file("TARGET", path)
    files.write_text(path, source.read_text(encoding="utf-8"))
    return path


def not_there(path: Path) -> str:
    """What to say behind the name of a recipe that does not exist: which one was meant, or how to get it."""
    place = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    name = next(iter(get_close_matches(path.stem, known(), 1)), None)
    if name is None or files.near_miss(place):
        return files.not_there(place)
    file = place.with_name(f"{name}.yaml")
    target = "" if file == Path(file.name) else f" {file}"
    meant = ":" if name == path.stem else f", did you mean {name}?"
    return f"does not exist{meant} `lcprune recipes copy {name}{target}` writes {file}"


def headline(file: Path) -> str:
    """The first sentence of a recipe's header."""
    lines: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# "))
    # Not "eq. 1": a sentence ends where the next word is a large one.
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(lines), maxsplit=1)[0]


def _list() -> None:
    console = Console()
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, file in known().items():
        if file.parent.name == MODELS and file == next(f for f in known().values() if f.parent.name == MODELS):
            table.add_section()
        table.add_row(name, headline(file))
    console.print(table)
    console.print("\n[dim]a copy to edit:[/] lcprune recipes copy NAME [TARGET]", highlight=False)


def _named(name: str) -> Path:
    recipes = known()
    stem = Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    if stem in recipes:
        return recipes[stem]
    near = get_close_matches(stem, recipes, 1)
    raise InputError(
        f"{name!r} is not a recipe{f', did you mean {near[0]}?' if near else ';'} the recipes are {', '.join(recipes)}."
    )


def _folder() -> Path:
    package = Path(lcprune.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"
