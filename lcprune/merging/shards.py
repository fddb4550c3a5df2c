"""Folders of safetensors files, read and written one tensor at a time: models that do not fit into memory.

    shards = Shards(folder)                     headers only
    shards.read("lm_head.weight")               one tensor
    shards.rows("embed.weight", [3, 4, 90])     some of its rows
    shards.pieces("lm_head.weight")             all of it in pieces of bounded size

    writer = ShardWriter(folder, expected)      names, shapes and dtypes of all that will come
    writer.write("lm_head.weight", pieces)      every one of them once, in any order
    writer.verify()                             reads everything back

The format is eight bytes with the header's length, the header as JSON (name -> dtype, shape, offsets), the raw bytes;
see https://huggingface.co/docs/safetensors. Plain reads and writes instead of memory maps: a mapped file counts
against a limit on the address space, and its pages against the resident memory.
"""

import errno
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lcprune.errors import InputError, RunError
from lcprune.weights import INDEX, ONE_FILE, files_of, header_of

SHARD_BYTES = 5 * 10**9
"""Most bytes of one written file, unless a single tensor is larger."""
PIECE = 2**22
"""Elements of a piece: what is in memory of a tensor that is copied or checked."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of dtypes; others (packed and quantised ones) cannot be merged."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    """The file that holds it."""
    dtype: str
    """The format's name of its dtype."""
    shape: tuple[int, ...]
    """Its shape."""
    start: int
    """Offset of its first byte in the file."""


class Shards:
    """The tensors of a folder by name; no file stays open."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers.

        Args:
            folder: Holds model.safetensors, or model.safetensors.index.json and the files it names.

        Raises:
            InputError: The folder holds no such files, or one is missing, cut off or no safetensors file.
        """
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        """Every tensor by name."""
        for file in files_of(folder):
            self.entries |= _read_header(file)

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=self.dtype(name))
        with FileIO(entry.file) as file:
            _fill(file, entry.start, tensor)
        return tensor

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """The rows `indices` of a tensor, in that order, and nothing else of it."""
        entry = self.entries[name]
        tensor = torch.empty((len(indices), *entry.shape[1:]), dtype=self.dtype(name))
        size = prod(entry.shape[1:]) * tensor.itemsize
        jumps = (at for at, (left, right) in enumerate(pairwise(indices), 1) if right != left + 1)
        starts = [0, *jumps, len(indices)] if indices else []
        with FileIO(entry.file) as file:
            for start, end in pairwise(starts):
                _fill(file, entry.start + indices[start] * size, tensor[start:end])
        return tensor

    def pieces(self, name: str, elements: int = PIECE) -> Iterator[Tensor]:
        """A tensor from its first element to its last in flat pieces of at most `elements`."""
        entry = self.entries[name]
        total, dtype = prod(entry.shape), self.dtype(name)
        with FileIO(entry.file) as file:
            for start in range(0, total, elements):
                piece = torch.empty(min(elements, total - start), dtype=dtype)
                _fill(file, entry.start + start * dtype.itemsize, piece)
                yield piece

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor; raises InputError for one that is no plain number."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise InputError(
                f"{name} in {entry.file} is stored as {entry.dtype}, which cannot be read layer by layer: "
                f"choose a model stored as one of {', '.join(DTYPES)}."
            )
        return DTYPES[entry.dtype]


class ShardWriter:
    """Writes a folder's tensors, each once and in any order, to files whose layout is fixed beforehand."""

    def __init__(self, folder: Path, expected: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
        """Makes the files with their headers, and the index if there are several.

        Args:
            folder: An existing folder.
            expected: What will be written, by name; only shape and dtype are looked at, so meta tensors will do.
            shard_bytes: Most bytes of one file.

        Raises:
            OSError: The disk has no room for all of it.
        """
        total = sum(tensor.nbytes for tensor in expected.values())
        if total > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, f"No space left on device, {total / 1e9:.1f} GB are needed", str(folder))
        self._folder, self._expected = folder, expected
        self._entries: dict[str, Entry] = {}
        self._sums: dict[str, int] = {}
        groups = _split(expected, shard_bytes)
        for number, names in enumerate(groups, 1):
            file = ONE_FILE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
            self._entries |= _write_header(folder / file, {name: expected[name] for name in names})
        if len(groups) > 1:
            count = sum(tensor.numel() for tensor in expected.values())
            index = {
                "metadata": {"total_parameters": count, "total_size": total},
                "weight_map": {name: entry.file.name for name, entry in sorted(self._entries.items())},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Writes one tensor.

        Args:
            name: One of the expected names, not written before.
            pieces: The whole tensor, or consecutive parts of it; cast to the expected dtype.
        """
        entry, expected = self._entries[name], self._expected[name]
        assert name not in self._sums, f"{name} is written twice"
        written, checksum = 0, 0
        with FileIO(entry.file, "r+") as file:
            file.seek(entry.start)
            for piece in pieces:
                data = _bytes(piece.to("cpu", expected.dtype).contiguous())
                checksum = zlib.crc32(data, checksum)
                written += len(data)
                while data:
                    data = data[file.write(data) :]
        assert written == expected.nbytes, f"{name} has {written} bytes, {expected.nbytes} are expected"
        self._sums[name] = checksum

    def verify(self) -> None:
        """Opens the folder again and compares every name, shape, dtype and byte with what was written.

        Raises:
            RunError: Something differs.
        """
        missing = self._expected.keys() - self._sums.keys()
        assert not missing, f"never written: {sorted(missing)}"
        shards = Shards(self._folder)
        wrong = shards.entries.keys() ^ self._expected.keys()
        wrong |= {
            name for name in shards.entries.keys() & self._expected.keys() if not self._is_as_written(shards, name)
        }
        if wrong:
            raise RunError(
                f"The written folder, read back, differs in {len(wrong)} of {len(self._expected)} tensors, first "
                f"{min(wrong)}: check the disk; nothing was left behind."
            )

    def _is_as_written(self, shards: Shards, name: str) -> bool:
        entry, expected = shards.entries[name], self._expected[name]
        if entry.dtype != NAMES[expected.dtype] or entry.shape != tuple(expected.shape):
            return False
        checksum = 0
        for piece in shards.pieces(name):
            checksum = zlib.crc32(_bytes(piece), checksum)
        return checksum == self._sums[name]


def _read_header(file: Path) -> dict[str, Entry]:
    start, header = header_of(file)
    return {
        name: Entry(file, held["dtype"], tuple(held["shape"]), start + held["data_offsets"][0])
        for name, held in header.items()
    }


def _split(expected: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Runs of names, each within the limit or a single tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in expected.items():
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return groups


def _write_header(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Makes the file at its full length, without the tensors' bytes."""
    # Wide types first, so that every tensor is aligned to its own width.
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with FileIO(file, "x") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    return _read_header(file)


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _fill(file: FileIO, start: int, tensor: Tensor) -> None:
    """Reads a contiguous tensor's bytes from `start` of the file on."""
    if not tensor.numel():
        return
    left = _bytes(tensor)
    file.seek(start)
    while left:
        count = file.readinto(left)
        if not count:
            raise InputError(f"{file.name!r} ends too early: fetch or write it again.")
        left = left[count:]
