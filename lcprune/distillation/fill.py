"""Fills a teacher cache (cache.py): the teacher runs once over every block of the training text.

Shards are cut by number, so that one is a function of the origin and its number alone: a run that was killed goes on
behind the last whole shard, makes damaged ones anew, and ends with the same bytes as one that was not. A shard is
written beside its place, renamed, and only then entered into the manifest.
"""

import errno
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from lcprune import identity
from lcprune.distillation.buckets import Buckets, top
from lcprune.distillation.cache import KEY_BYTES, MANIFEST, Manifest, Origin, Shard, batch_of, is_whole, keys_of
from lcprune.distillation.fused import CHUNK
from lcprune.distillation.head import Head
from lcprune.distillation.passes import Wanted
from lcprune.distillation.teacher import Teacher
from lcprune.errors import InputError
from lcprune.files import check_file, write_bytes
from lcprune.merging.progress import track

SHARD_BYTES = 64 * 10**6
"""About as much as a kill can lose, and as is held in memory."""

OURS = (".shard-", "shard-", f".{MANIFEST}.")
"""How the names of files begin that a run which was killed may have left."""


def different(blocks: Tensor) -> Tensor:
    """Every block [N, T] that is there, once, in order."""
    first = {key: place for place, key in reversed(list(enumerate(keys_of(blocks))))}
    return blocks[sorted(first.values())]


def origin_of(name: str, blocks: Tensor, *, dtype: str, batch_size: int, top_k: int, layers: tuple[int, ...]) -> Origin:
    """What a cache of the teacher `name` over these blocks [N, T], no two of them alike, comes from."""
    return Origin(
        teacher=identity.weights_of(name),
        vocabulary=identity.vocabulary_of(name),
        dtype=dtype,
        blocks=len(blocks),
        block_size=blocks.shape[-1],
        keys=hashlib.sha256(b"".join(keys_of(blocks))).hexdigest(),
        batch_size=batch_size,
        top_k=top_k,
        layers=layers,
    )


def block_bytes(origin: Origin, hidden: int) -> int:
    """How much disk a block takes.

    Args:
        origin: What is kept.
        hidden: D of the teacher.
    """
    tokens = origin.top_k * (4 + 4) + 4 + 2 * hidden * len(origin.layers)
    return KEY_BYTES + origin.block_size * tokens


class Filling:
    """A cache that is being made."""

    def __init__(self, folder: Path, origin: Origin, hidden: int, shard_bytes: int = SHARD_BYTES) -> None:
        """Looks at what is there already; writes nothing.

        Args:
            folder: Empty, missing, or with a part of this very cache.
            origin: What the cache is made from.
            hidden: D of the teacher.
            shard_bytes: About how many bytes a shard has.

        Raises:
            InputError: The folder holds something else.
            OSError: The disk has no room for what is missing.
        """
        check_file("--out", folder / MANIFEST)
        self.folder = folder
        self.origin = origin
        per_block = block_bytes(origin, hidden)
        self._rows = max(1, shard_bytes // per_block // origin.batch_size) * origin.batch_size
        starts = range(0, origin.blocks, self._rows)
        self._parts = {f"shard-{number:05}.safetensors": start for number, start in enumerate(starts)}
        self._shards = {shard.file: shard for shard in self._there() if is_whole(folder, shard)}
        missing = origin.blocks - sum(shard.blocks for shard in self._shards.values())
        self.blocks_left = missing
        """How many blocks the teacher has still to be run over."""
        self.bytes = origin.blocks * per_block
        """How much disk the whole cache takes, about."""
        exists = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if missing * per_block > shutil.disk_usage(exists).free:
            need = f"No space left on device, {missing * per_block / 1e9:.1f} GB are needed"
            raise OSError(errno.ENOSPC, need, str(folder))

    @property
    def manifest(self) -> Manifest:
        """What is whole by now."""
        return Manifest(self.origin, tuple(self._shards[file] for file in sorted(self._shards)))

    def _there(self) -> tuple[Shard, ...]:
        if (self.folder / MANIFEST).is_file():
            manifest = Manifest.read(self.folder)
            differing = manifest.origin.differences(self.origin)
            if differing:
                raise InputError(
                    f"--out {self.folder} holds another cache ({'; '.join(differing)}): name another folder, or delete "
                    "this one."
                )
            return manifest.shards
        others = [file.name for file in self.folder.glob("*") if not file.name.startswith(OURS)]
        if others:
            raise InputError(f"--out {self.folder} holds other files ({min(others)}): name an empty or a new folder.")
        return ()

    def run(self, teacher: Teacher, blocks: Tensor) -> None:
        """Runs the teacher over what is missing and writes it.

        Args:
            teacher: Of the origin.
            blocks: Every block [N, T], in the origin's order.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(".*.tmp*"):  # of a run that was killed
            old.unlink()
        missing = [
            (file, blocks[start : start + self._rows])
            for file, start in self._parts.items()
            if file not in self._shards
        ]
        batches = (batch for _, rows in missing for batch in rows.split(self.origin.batch_size))
        count = sum(len(rows.split(self.origin.batch_size)) for _, rows in missing)
        # Multiplied out in float32 whatever the teacher is held in, as `fit` does unless autocast says otherwise.
        head = teacher.head.to(torch.float32)
        answers = (self._answer(teacher, head, batch) for batch in track(batches, "batches through the teacher", count))
        for file, rows in missing:
            self._write(file, rows, answers)

    def _answer(self, teacher: Teacher, head: Head, batch: Tensor) -> dict[str, Tensor]:
        """Everything that is kept about some blocks."""
        rows = batch.to(teacher.model.device, torch.int64)
        states = teacher(batch_of(rows), Wanted(outputs=self.origin.layers))
        assert states.last is not None
        known = _top(head, states.last, self.origin.top_k)
        kept = {f"states.{layer}": state.to(torch.bfloat16) for layer, state in states.layers.items()}
        kept |= {"ids": known.ids, "log_p": known.log_p, "log_tail": known.log_tail}
        return {name: tensor.cpu() for name, tensor in kept.items()}

    def _write(self, file: str, rows: Tensor, answers: Iterator[dict[str, Tensor]]) -> None:
        parts = [next(answers) for _ in rows.split(self.origin.batch_size)]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        keys = b"".join(keys_of(rows))
        tensors["keys"] = torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(len(rows), KEY_BYTES)
        content = save(tensors)
        write_bytes(self.folder / file, content)
        tail = tensors["log_tail"].double().exp().mean().item()
        self._shards[file] = Shard(file, len(rows), hashlib.sha256(content).hexdigest(), tail)
        write_bytes(self.folder / MANIFEST, self.manifest.to_json().encode())


def _top(head: Head, last_BTD: Tensor, k: int) -> Buckets:
    """The likeliest tokens [B, T, k]; logits exist for a chunk of tokens at a time."""
    shape = last_BTD.shape[:2]
    with torch.no_grad():
        parts = [top(head(states.float()), k) for states in last_BTD.flatten(0, 1).split(CHUNK)]
    ids, log_p, log_tail = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_p", "log_tail"))
    return Buckets(ids.unflatten(0, shape), log_p.unflatten(0, shape), log_tail.unflatten(0, shape))
