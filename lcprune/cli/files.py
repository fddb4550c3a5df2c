"""Files that are whole or not there: written beside, then renamed."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8; whatever fails leaves the file as it was and nothing beside it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file; whatever fails leaves it as it was and nothing beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
