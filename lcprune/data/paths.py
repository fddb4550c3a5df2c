"""Which files a setting names: one, several, those of a folder, or those that a pattern finds.

    my.jsonl    [b.jsonl, a.jsonl.gz]    texts    texts/*.txt

All are of one kind, compressed or not, and are read as one data set. Those of a list are in the list's order, those of
a folder or a pattern in that of their names. What lies in a folder's own folders is left out (`texts/**/*.txt` finds
it), and so are files of other kinds than these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from lcprune.files import not_there, path_of

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""What `datasets` reads files with columns by."""
KINDS = (*BUILDERS, ".txt")
"""Files that can be read."""
COMPRESSED = (".gz", ".zst")
"""What may stand behind."""

Given: TypeAlias = list[str | Path] | str | Path
"""As a user names files."""


@dataclass(frozen=True)
class Files:
    """Files that are read as one data set."""

    name: str
    """As the user named them."""
    paths: tuple[Path, ...]
    """In the order in which they are read."""
    empty: tuple[Path, ...] = ()
    """Folders and patterns without any."""

    def __str__(self) -> str:
        return self.name

    @property
    def kind(self) -> str:
        """Of all of them, such as .jsonl."""
        return kind_of(self.paths[0])

    def mistakes(self) -> list[str]:
        """What is wrong with them before they are read, in words that begin with a name."""
        if self.empty or not self.paths:
            return [f"{each} names no file that ends in {', '.join(KINDS)}: name one" for each in self.empty or ("[]",)]
        found = {path: mistake for path in self.paths if (mistake := _mistake(path))}
        if not found and len(kinds := dict.fromkeys(map(kind_of, self.paths))) > 1:
            return [f"{self.name} are files of several kinds ({', '.join(kinds)}): name those of one"]
        return [f"{path} {mistake}" for path, mistake in found.items()]


def files_of(field: str, given: Given) -> Files:
    """The files that a setting names.

    Args:
        field: The setting, for the message.
        given: Its value; a pattern's or folder's files are looked up now.

    Raises:
        InputError: It is neither text, a path, nor a list of these.
    """
    several = list(given) if isinstance(given, list | tuple) else [given]
    paths = [path_of(field, each) for each in several]
    name = ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    found = {path: _found(path) for path in paths}
    empty = tuple(path for path, files in found.items() if not files)
    return Files(name, tuple(file for path in paths for file in found[path]), empty)


def kind_of(path: Path) -> str:
    """The end of a file's name, without that of its compression."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return plain.suffix.lower()


def is_compressed(path: Path) -> bool:
    """Whether a file's name says so."""
    return path.suffix.lower() in COMPRESSED


def _found(path: Path) -> Sequence[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file() and _is_text(file))
    if not path.exists() and has_magic(str(path)):
        found = glob(str(path), recursive=True)  # noqa: PTH207 - Path's finds hidden files too
        return sorted(file for file in map(Path, found) if file.is_file())
    return [path]


def _is_text(path: Path) -> bool:
    return kind_of(path) in KINDS and not path.name.startswith(".")


def _mistake(path: Path) -> str | None:
    """What is wrong with a file, to be put behind its name; None if nothing is."""
    if not path.exists():
        return not_there(path)
    if not path.is_file():
        return "is not a file: name one file"
    if kind_of(path) not in KINDS:
        return f"ends in {path.suffix or 'nothing'!r}, which is not one of {', '.join(KINDS)}: convert or rename it"
    if path.stat().st_size == 0:
        return "is empty: give a file with text"
    if path.suffix.lower() == ".zst" and find_spec("zstandard") is None:
        return "needs the package zstandard, not installed here: install it, or compress the file by gzip"
    return None
