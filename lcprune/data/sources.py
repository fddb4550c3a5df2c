"""Where documents come from: local files and data sets on the Hugging Face hub, with every mistake explained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from lcprune.data.columns import Columns, Documents, documents_of
from lcprune.errors import InputError, reason
from lcprune.files import not_there

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SUFFIXES = (*_BUILDERS, ".txt")


def file_mistake(path: Path) -> str | None:
    """What is wrong with a file before it is read, to be put behind its name; None if nothing is."""
    if not path.exists():
        return not_there(path)
    if not path.is_file():
        return "is not a file: name one file"
    if path.suffix.lower() not in _SUFFIXES:
        return f"ends in {path.suffix or 'nothing'!r}, which is not one of {', '.join(_SUFFIXES)}: convert or rename it"
    if path.stat().st_size == 0:
        return "is empty: give a file with text"
    return None


def read_file(field: str, path: Path, columns: Columns) -> Documents:
    """The documents of a local file: one a row, or all of a .txt file as one; rows with nothing in them are left out.

    Args:
        field: The setting that names the file, for the messages.
        path: A .jsonl, .json, .csv, .parquet or .txt file.
        columns: Those that hold the documents.

    Raises:
        InputError: The file cannot be read, has no such column, or nothing in it.
    """
    from datasets import load_dataset

    kind, source = path.suffix.lower(), f"{field}={path}"
    with _explained(source, f"check that it really is {kind[1:]} in UTF-8"):
        if kind == ".txt":
            text = path.read_text(encoding="utf-8")
        else:
            data = load_dataset(_BUILDERS[kind], data_files=escape(str(path)), split="train")
            return documents_of({name: data[name] for name in data.column_names}, columns, source)
    if not text.strip():
        raise InputError(f"{source} is blank: give a file with text.")
    return Documents("text", [text], columns=(columns.text,))


def read_texts(field: str, path: Path, column: str) -> list[str]:
    """As `read_file`, of plain text alone."""
    documents = read_file(field, path, Columns(column))
    if documents.kind != "text":
        raise InputError(
            f"data.text_column={column!r} is not in {field}={path}, which has {', '.join(documents.columns)}: set "
            "data.text_column to the one that holds the text."
        )
    return list(documents.texts)


def read_hub(name: str, config: str | None, split: str, columns: Columns) -> Documents:
    """The documents of a data set on the hub, one a row; rows with nothing in them are left out.

    Raises:
        InputError: The data set cannot be had, has no such column, or nothing in it.
    """
    from datasets import load_dataset

    source = f"data.dataset={name!r} (data.dataset_config={config!r}, data.split={split!r})"
    with _explained(source, "check these three and the network, or name a local file with data.path"):
        data = load_dataset(name, config, split=split)
        return documents_of({column: data[column] for column in data.column_names}, columns, source)


def stream_file(path: Path) -> Callable[[int], Iterator[dict[str, object]]]:
    """Opens a .jsonl, .csv or .parquet file at a row, without reading it whole."""
    return _stream(f"data.path={path}", _BUILDERS[path.suffix.lower()], None, "train", escape(str(path)))


def stream_hub(name: str, config: str | None, split: str) -> Callable[[int], Iterator[dict[str, object]]]:
    """Opens a data set on the hub at a row, without fetching it whole."""
    source = f"data.dataset={name!r} (data.dataset_config={config!r}, data.split={split!r})"
    return _stream(source, name, config, split, None)


def _stream(
    source: str, name: str, config: str | None, split: str, files: str | None
) -> Callable[[int], Iterator[dict[str, object]]]:
    def rows_from(row: int) -> Iterator[dict[str, object]]:
        from datasets import load_dataset

        with _explained(source, "check that it really is what it is called, and the network if it is on the hub"):
            data = load_dataset(name, config, data_files=files, split=split, streaming=True)
            yield from data.skip(row) if row else data

    return rows_from


@contextmanager
def _explained(source: str, way_out: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except InputError:  # rows are decoded where their columns are looked through
        raise
    except (OSError, ValueError, DatasetsError, StopIteration) as error:  # StopIteration: a file without a single row
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer sentences say nothing
            cause = cause.__cause__
        said = reason(cause) if str(cause).strip() else "no rows"
        raise InputError(f"{source} could not be read ({said}): {way_out}.") from error
