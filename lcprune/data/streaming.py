"""A text too large for the memory: read window by window, over and over, and resumable at every batch.

    rows  0 .............. 9999 | 10000 .............. 19999 | ...
          window 0               window 1                     the last one, then window 0 again
          tokens -> blocks, shuffled -> batches

Only one window is in memory. Its order is a pure function of seed, round and first row, so that a position is four
numbers: after an interruption the window is read again and the batches that were handed out are skipped. Every rank
reads every window and takes its share of the blocks. What of a window is too little for a batch on every rank is left
out.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeAlias

import torch

from lcprune.data.columns import Columns, Documents, NothingThere, documents_of
from lcprune.data.loader import Batch, generator
from lcprune.data.packing import Blocks, training_batch_of
from lcprune.errors import InputError

Reader: TypeAlias = Callable[[int], Iterator[dict[str, object]]]
"""From the first row wanted, counted from 0, to the rows from there on."""


class Windows:
    """The documents of a stream of rows, so many at a time."""

    def __init__(self, rows: Reader, size: int, columns: Columns, source: str) -> None:
        """Reads nothing yet.

        Args:
            rows: Opens the stream.
            size: Rows in a window.
            columns: Those that are named.
            source: The setting that the rows come from, for messages.
        """
        self.size = size
        self._rows, self._columns, self._source = rows, columns, source

    def first(self) -> Documents:
        """The documents of the first window.

        Raises:
            InputError: There are none, or they are not what they should be.
        """
        documents = next(self.behind(0), None)
        if documents is None:
            raise InputError(f"{self._source} has no rows: give a file or data set with text.")
        return documents[1]

    def behind(self, row: int) -> Iterator[tuple[int, Documents]]:
        """The windows from a row on, each with its first row, to the end of the stream.

        The first one has to have text in it; of later ones those without any are passed over.
        """
        rows = self._rows(row)
        while some := list(islice(rows, self.size)):
            names = {name: None for each in some for name in each}
            columns = {name: [each.get(name) for each in some] for name in names}
            try:
                documents = documents_of(columns, self._columns, f"{self._source}, rows {row} to {row + len(some) - 1}")
            except NothingThere:
                if not row:
                    raise
            else:
                yield row, documents
            row += len(some)


class StreamLoader:
    """Batches of a stream, as many as a run takes; Lightning saves and restores the position."""

    def __init__(
        self,
        windows: Windows,
        blocks_of: Callable[[int, Documents], Blocks],
        share: "Share",
        batches: int,
        text_crc32: int,
    ) -> None:
        """Begins at the first row.

        Args:
            windows: The stream.
            blocks_of: Makes blocks of a window, which begins at a row.
            share: Of the blocks, what this rank gets and in which order.
            batches: How many a run takes; Lightning must know, else it fetches one ahead.
            text_crc32: A checksum of the first window's blocks: whether a resumed run has the same text.
        """
        self._windows, self._blocks_of, self._share, self._batches = windows, blocks_of, share, batches
        self._same = {"window": windows.size, "text_crc32": text_crc32, **share.same}
        self._round = self._row = self._batch = 0

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        while True:
            handed_out, begun = 0, self._row + self._batch
            for row, documents in self._windows.behind(self._row):
                for batch in self._share.batches(self._blocks_of(row, documents), self._round, row, self._begin(row)):
                    self._batch += 1
                    handed_out += 1
                    yield batch
            if not handed_out and not begun:
                raise InputError("no window of the stream has enough text for a batch: raise data.streaming_window.")
            self._round, self._row, self._batch = self._round + 1, 0, 0

    def _begin(self, row: int) -> int:
        """At which batch of a window to begin."""
        if row != self._row:
            self._row, self._batch = row, 0
        return self._batch

    def state_dict(self) -> dict[str, int]:
        """The position, and what must be the same for it to mean the same; equal on every rank."""
        return {"round": self._round, "row": self._row, "batch": self._batch, **self._same}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues from a saved position at the next iteration.

        Raises:
            InputError: It is one in other batches than these.
        """
        changes = [
            f"{name} was {state_dict.get(name)}, is {now}"
            for name, now in self._same.items()
            if now != state_dict.get(name)
        ]
        if changes:
            raise InputError(
                f"the checkpoint stopped in a stream of other batches ({', '.join(changes)}): resume with the same "
                "data settings, text and number of devices, or start a new run."
            )
        self._round, self._row, self._batch = (state_dict[name] for name in ("round", "row", "batch"))


class Share:
    """What one rank gets of the blocks of a window, and in which order."""

    def __init__(self, batch_size: int, devices: int, rank: int, seed: int) -> None:
        """Ranks have equally many batches, and no block is in two."""
        self.same = {"batch_size": batch_size, "devices": devices, "seed": seed}
        """What decides the order."""
        self._rank = rank

    def batches(self, blocks: Blocks, round_: int, row: int, begin: int) -> Iterator[Batch]:
        """The batches of a window, from the `begin`-th on.

        Args:
            blocks: Of the window.
            round_: How often the stream was read to its end before.
            row: The window's first.
            begin: How many batches to skip.
        """
        batch_size, devices, seed = self.same.values()
        count = len(blocks["input_ids"])
        order = torch.randperm(count, generator=generator(seed, f"stream/{round_}/{row}"))
        mine = order[: count // (batch_size * devices) * batch_size * devices][self._rank :: devices]
        for chosen in mine.view(-1, batch_size)[begin:]:
            rows = zip(*(tensor[chosen] for tensor in blocks.values()), strict=True)
            yield training_batch_of(tuple(blocks), list(rows))
