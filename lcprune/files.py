"""Files that are whole or not there: written beside, then renamed; their hashes; where this user's cache is."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import BinaryIO

from lcprune.errors import InputError

PARTIAL = ".tmp-"
"""Between the hidden name of what is being written and the number of the process that writes it."""
LONGEST = 100
"""Characters of a value that a sentence repeats."""
LEFT_ALONE = 60.0
"""Seconds in which nobody has written to what a process that is gone was writing, before it counts as left behind."""
LARGE = 1 << 26
"""Bytes; hashes of larger files are remembered."""


def cache_folder() -> Path:
    """`LCPRUNE_CACHE` where it is set, else lcprune's folder in the user's own cache; it need not exist yet."""
    if own := os.environ.get("LCPRUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lcprune"


def said(value: object) -> str:
    """A value of the wrong kind in a message: what it is, where it is too long to be shown."""
    return shown if len(shown := repr(value)) <= LONGEST and "\n" not in shown else f"<{type(value).__name__}>"


def path_of(field: str, given: str | Path) -> Path:
    """The path that a setting gives, `~` expanded.

    Args:
        field: The setting, for the message.
        given: As a user gives it.

    Raises:
        InputError: It is neither text nor a path.
    """
    if not isinstance(given, str | Path):
        raise InputError(f"{field}={said(given)} must be text or a path.")
    return Path(given).expanduser()


def near_miss(path: Path) -> Path | None:
    """The file that a path to nothing may have meant: the one beside it with the most similar name; None if none is."""
    names = [file.name for file in path.parent.glob("*") if file.is_file()]
    return next((path.with_name(name) for name in get_close_matches(path.name, names, 1)), None)


def not_there(path: Path) -> str:
    """What to say behind the name of a file that does not exist."""
    if near := near_miss(path):
        return f"does not exist, did you mean {near}? check the path"
    return "does not exist: check the path (it counts from the folder the command runs in)"


def check_file(named: str, path: Path) -> None:
    """Looks at a file that is to be written, before the work that it is for.

    Args:
        named: The option that names it.
        path: It need not exist, nor its folder.

    Raises:
        InputError: It is a folder or a device, or lies where nothing can be written.
    """
    if path.is_dir():
        raise InputError(f"{named} {path} is a folder: name a file in it.")
    if path.exists() and not path.is_file():
        raise InputError(f"{named} {path} is no plain file, which would be replaced: name another one.")
    check_place(f"{named} {path}", path)


def check_place(given: str, path: Path) -> None:
    """Raises InputError, with what was given, unless a file or folder can be made there."""
    place = next(folder for folder in path.resolve().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{given} cannot be made, {place} is not a folder that you may write to: name another place.")


def for_json(data: object) -> object:
    """The same with lists for tuples, and None for numbers that JSON does not know."""
    if isinstance(data, dict):
        return {key: for_json(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [for_json(value) for value in data]
    return None if isinstance(data, float) and not isfinite(data) else data


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8; whatever fails leaves the file as it was and nothing beside it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file through to the disk; whatever fails leaves it as it was and nothing beside it."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well; else nothing has happened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process alone: another may be writing the same file.
    partial = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def left_behind(folder: Path, name: str, mark: str = PARTIAL) -> list[Path]:
    """Partial files and folders that killed processes left.

    Args:
        folder: Where to look.
        name: Of what they were to become; may be a pattern such as `*.ckpt`.
        mark: What stands between that name and the number of the process.
    """
    return [path for path in folder.glob(f".{name}{mark}*") if _is_left(path, mark)]


def _is_left(path: Path, mark: str) -> bool:
    writer = path.name.rpartition(mark)[2]
    # On a disk that machines share, a process of another one may be writing: then the file is fresh.
    return writer.isdecimal() and not _runs(int(writer)) and time.time() - path.stat().st_mtime > LEFT_ALONE


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def hash_of(file: Path) -> str:
    """The SHA-256 of a file; a large one's is remembered as long as its size and time stay."""
    stat = file.stat()
    key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    memory = cache_folder() / "hashes" / hashlib.sha256(key.encode()).hexdigest()
    if memory.is_file():
        return memory.read_text(encoding="utf-8")
    digest = sha256_of(file)
    if stat.st_size >= LARGE:
        with suppress(OSError):  # next time it is only computed again
            write_text(memory, digest)
    return digest


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file as it is now."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
