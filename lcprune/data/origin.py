"""Where the documents of a run come from, and what can be wrong with that before anything is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lcprune.data.columns import TEXT, Columns, Documents
from lcprune.data.corpus import Source
from lcprune.data.generate import COLUMN, Generate, text_file
from lcprune.data.mixture import Part
from lcprune.data.paths import Files, files_of
from lcprune.data.sources import read_file, read_hub, stream_files, stream_hub
from lcprune.data.streaming import Windows
from lcprune.files import said

LINEWISE = (".jsonl", ".csv", ".parquet")
"""Files that can be read row by row."""


@dataclass(frozen=True)
class Origin:
    """Of a file, a data set, the teacher, several sets, or the built-in text; one of them is named at most."""

    path: Files | None
    """Local files."""
    validation_path: Files | None
    """Local files with what is validated on."""
    dataset: str | None
    """A data set on the hub."""
    dataset_config: str | None
    """Its configuration."""
    split: str
    """Its split."""
    generate: Generate | None
    """How the teacher writes the text."""
    mixture: Sequence[Part] | None
    """Several sets with weights."""
    columns: Columns
    """Those that are named."""
    window: int | None
    """Rows that are read at a time; None = all at once."""

    @property
    def name(self) -> str:
        """What a file or a data set is called in messages."""
        return str(self.path or self.dataset)

    def fetch(self, teacher: str) -> None:
        """Has everything on this machine that is read whole; `teacher` as in `sources`."""
        if self.generate is not None:
            text_file(self.generate, teacher=teacher, column=self.columns.text)
        elif (self.dataset is not None or self.mixture is not None) and self.window is None:
            self.sources(teacher)

    def sources(self, teacher: str) -> list[Source]:
        """The sets of documents; of a stream its first window.

        Args:
            teacher: The model that writes, unless `generate` names another.

        Raises:
            InputError: A set cannot be read, has no such columns, or nothing in them.
        """
        if self.window is not None:
            rank_zero_info(f"{self.name}: read bit by bit; figures are those of the first {self.window:,} rows")
            return [Source(self.name, self.windows().first())]
        if self.mixture is not None:
            return [Source(part.name, _documents_of(part), part.weight) for part in self.mixture]
        if self.path is not None:
            return [Source(self.name, read_file("data.path", self.path, self.columns))]
        if self.dataset is not None:
            return [Source(self.dataset, read_hub(self.dataset, self.dataset_config, self.split, self.columns))]
        if self.generate is not None:
            path = text_file(self.generate, teacher=teacher, column=self.columns.text)
            rank_zero_info(f"text written by {self.generate.model or teacher}: {path}")
            return [
                Source("data.generate", read_file("data.generate", files_of("data.generate", path), Columns(COLUMN)))
            ]
        from pydoc_data.topics import topics

        return [Source("the built-in text", Documents("text", [topics[name] for name in sorted(topics)]))]

    def held_out(self) -> Documents | None:
        """What is validated on, where it has a file of its own."""
        if self.validation_path is None:
            return None
        return read_file("data.validation_path", self.validation_path, self.columns)

    def windows(self) -> Windows:
        """The documents of a stream."""
        assert self.window is not None
        if self.path is not None:
            return Windows(stream_files(self.path), self.window, self.columns, f"data.path={self.path}")
        assert self.dataset is not None
        rows = stream_hub(self.dataset, self.dataset_config, self.split)
        return Windows(rows, self.window, self.columns, f"data.dataset={self.dataset!r}")

    def mistakes(self) -> Iterator[str]:
        """What is wrong with the settings, in words."""
        if not isinstance(self.dataset, str | None):
            yield (
                f"data.dataset={said(self.dataset)} must be the name of a data set on the hub: write one that is in "
                'memory to a file (dataset.to_json("my.jsonl")) and name that with data.path'
            )
            return
        sources = {
            f"data.path={self.path}": self.path,
            f"data.dataset={self.dataset!r}": self.dataset,
            "data.generate": self.generate,
            "data.mixture": self.mixture,
        }
        if len(given := [name for name, value in sources.items() if value is not None]) > 1:
            yield f"{' and '.join(given)} are {'both' if len(given) == 2 else 'all'} set: keep one of them"
        if self.dataset is None and (self.dataset_config is not None or self.split != "train"):
            yield "data.dataset_config and data.split belong to data.dataset, which is not set: set it or drop them"
        if self.mixture is not None and len(self.mixture) < 2:
            yield "data.mixture has fewer than two parts: name two or more, or the one with data.path or data.dataset"
        yield from self._column_mistakes()
        if self.window is not None:
            yield from self._stream_mistakes()
        files = [("data.path", self.path), ("data.validation_path", self.validation_path)]
        if self.generate is not None and self.generate.prompts is not None:
            files.append(("data.generate.prompts", files_of("data.generate.prompts", self.generate.prompts)))
        for part in self.mixture or ():
            if part.path is not None:
                files.append(("data.mixture: path", files_of("data.mixture: path", part.path)))
        yield from (f"{field}={mistake}" for field, each in files if each for mistake in each.mistakes())

    def _column_mistakes(self) -> Iterator[str]:
        yield from self.columns.mistakes()
        columns = self.columns
        files_with_columns = [
            files for files in (self.path, self.validation_path) if files and files.paths and files.kind != ".txt"
        ]
        with_columns = self.dataset is not None or self.generate is not None or files_with_columns
        named = {
            "text_column": None if columns.text == TEXT else columns.text,
            "messages_column": columns.messages,
            "prompt_column": columns.prompt,
            "response_column": columns.response,
        }
        for field, name in named.items():
            if name is not None and self.mixture is not None and not files_with_columns:
                yield f"data.{field}={name!r} belongs into the parts of data.mixture: name it there"
            elif name is not None and not with_columns:
                yield f"data.{field}={name!r} does nothing for text without columns: drop it"
            elif name is not None and self.generate is not None and field != "text_column":
                yield f"data.{field}={name!r} does nothing for text that the teacher writes: drop it"

    def _stream_mistakes(self) -> Iterator[str]:
        if (self.path is None) == (self.dataset is None):
            yield "data.streaming reads data.path or data.dataset: name one of them, or set it to false"
        elif self.path is not None and self.path.paths and self.path.kind not in LINEWISE:
            yield f"data.streaming cannot read {self.path} row by row: name a {', '.join(LINEWISE)} file"


def _documents_of(part: Part) -> Documents:
    if part.path is not None:
        return read_file("data.mixture", files_of("data.mixture: path", part.path), part.columns)
    assert part.dataset is not None
    return read_hub(part.dataset, part.dataset_config, part.split, part.columns)
