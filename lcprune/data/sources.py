"""Where documents come from: local files and data sets on the Hugging Face hub, with every mistake explained."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from lcprune.data.columns import Columns, Documents, documents_of
from lcprune.data.paths import BUILDERS, Files, files_of, is_compressed
from lcprune.errors import InputError, reason


def read_file(field: str, files: Files, columns: Columns) -> Documents:
    """The documents of local files: one a row, or all of a .txt file as one; rows with nothing in them are left out.

    Args:
        field: The setting that names the files, for the messages.
        files: Of one kind.
        columns: Those that hold the documents.

    Raises:
        InputError: A file cannot be read, has no such column, or there is nothing in any.
    """
    from datasets import load_dataset

    source, way_out = f"{field}={files}", f"check that it really is {files.kind[1:]} in UTF-8"
    way_out += ", and that all files have the same columns" if len(files.paths) > 1 and files.kind != ".txt" else ""
    if files.kind != ".txt":
        with _explained(source, way_out):
            data = load_dataset(BUILDERS[files.kind], data_files=_escaped(files.paths), split="train")
            return documents_of({name: data[name] for name in data.column_names}, columns, source)
    texts = []
    for path in files.paths:
        with _explained(f"{field}={path}", way_out):
            texts.append(_text_of(path))
    if not (said := [text for text in texts if text.strip()]):
        raise InputError(f"{source} is blank: give a file with text.")
    return Documents("text", said, columns=(columns.text,))


def _text_of(path: Path) -> str:
    from datasets import load_dataset

    if not is_compressed(path):
        return path.read_text(encoding="utf-8")
    data = load_dataset("text", data_files=_escaped([path]), split="train", sample_by="document")
    return "".join(data["text"])


def _escaped(paths: Sequence[Path]) -> list[str]:
    return [escape(str(path)) for path in paths]


def read_texts(field: str, path: Path, column: str) -> list[str]:
    """As `read_file`, of plain text alone."""
    documents = read_file(field, files_of(field, path), Columns(column))
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


def stream_files(files: Files) -> Callable[[int], Iterator[dict[str, object]]]:
    """Opens .jsonl, .csv or .parquet files at a row, one behind the other, without reading them whole."""
    return _stream(f"data.path={files}", BUILDERS[files.kind], None, "train", _escaped(files.paths))


def stream_hub(name: str, config: str | None, split: str) -> Callable[[int], Iterator[dict[str, object]]]:
    """Opens a data set on the hub at a row, without fetching it whole."""
    source = f"data.dataset={name!r} (data.dataset_config={config!r}, data.split={split!r})"
    return _stream(source, name, config, split, None)


def _stream(
    source: str, name: str, config: str | None, split: str, files: list[str] | None
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
    except (
        OSError,
        ValueError,
        EOFError,
        zlib.error,
        DatasetsError,
        StopIteration,
    ) as error:  # StopIteration: a file without a single row
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer sentences say nothing
            cause = cause.__cause__
        said = reason(cause) if str(cause).strip() else "no rows"
        raise InputError(f"{source} could not be read ({said}): {way_out}.") from error
