"""Where documents come from: local files and data sets on the Hugging Face hub, with every mistake explained."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from lcprune.errors import InputError

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SUFFIXES = (*_BUILDERS, ".txt")


def file_mistake(path: Path) -> str | None:
    """What is wrong with a file before it is read, to be put behind its name; None if nothing is."""
    if not path.exists():
        return "does not exist: check the path (it counts from the folder the command runs in)"
    if not path.is_file():
        return "is not a file: name one file"
    if path.suffix.lower() not in _SUFFIXES:
        return f"ends in {path.suffix or 'nothing'!r}, which is not one of {', '.join(_SUFFIXES)}: convert or rename it"
    if path.stat().st_size == 0:
        return "is empty: give a file with text"
    return None


def read_file(field: str, path: Path, column: str) -> list[str]:
    """The documents of a local file: one a row, or all of a .txt file as one; rows without text are left out.

    Args:
        field: The setting that names the file, for the messages.
        path: A .jsonl, .json, .csv, .parquet or .txt file.
        column: The one that holds the text.

    Raises:
        InputError: The file cannot be read, has no such column, or no text in it.
    """
    from datasets import load_dataset

    kind, source = path.suffix.lower(), f"{field}={path}"
    with _explained(source, f"check that it really is {kind[1:]} in UTF-8"):
        if kind == ".txt":
            rows = {column: [path.read_text(encoding="utf-8")]}
        else:
            data = load_dataset(_BUILDERS[kind], data_files=escape(str(path)), split="train")
            rows = {name: data[name] for name in data.column_names}
    return _texts(rows, column, source)


def read_hub(name: str, config: str | None, split: str, column: str) -> list[str]:
    """The documents of a data set on the hub, one a row; rows without text are left out.

    Raises:
        InputError: The data set cannot be had, has no such column, or no text in it.
    """
    from datasets import load_dataset

    source = f"data.dataset={name!r} (data.dataset_config={config!r}, data.split={split!r})"
    with _explained(source, "check these three and the network, or name a local file with data.path"):
        data = load_dataset(name, config, split=split)
    return _texts({name: data[name] for name in data.column_names}, column, source)


@contextmanager
def _explained(source: str, way_out: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError, StopIteration) as error:  # StopIteration: a file without a single row
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer sentences say nothing
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or ["no rows"])[0].rstrip(".: ").replace(". ", ", ")
        raise InputError(f"{source} could not be read ({reason}): {way_out}.") from error


def _texts(rows: Mapping[str, Iterable[object]], column: str, source: str) -> list[str]:
    if column not in rows:
        raise InputError(
            f"data.text_column={column!r} is not in {source}, which has the columns {', '.join(rows)}: "
            "set data.text_column to the one that holds the text."
        )
    texts = []
    for value in rows[column]:
        if not isinstance(value, str | None):
            raise InputError(
                f"data.text_column={column!r} of {source} holds {type(value).__name__} values, not text: "
                "set data.text_column to a column of strings."
            )
        if value is not None and value.strip():
            texts.append(value)
    if not texts:
        raise InputError(f"{source} holds no text in data.text_column={column!r}: give a file or data set with text.")
    return texts
