"""Files that are whole or not there: written beside, then renamed. And where this user's cache is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """`LCPRUNE_CACHE` where it is set, else lcprune's folder in the user's own cache; it need not exist yet."""
    if own := os.environ.get("LCPRUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lcprune"


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8; whatever fails leaves the file as it was and nothing beside it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file through to the disk; whatever fails leaves it as it was and nothing beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process alone: another may be writing the same file.
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """For what is too large for `write_bytes`: a name beside `path` to write to, which becomes `path` in the end.

    Whatever fails leaves `path` as it was and nothing beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
