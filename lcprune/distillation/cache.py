"""What the teacher says about every block of the training text, computed once and looked up in every epoch.

    FOLDER/manifest.json                what it was made from, and every shard's checksum
    FOLDER/shard-00000.safetensors      of some blocks of T tokens each:
        keys      [n, 16]     uint8      a hash of the block's token ids
        ids       [n, T, k]   int32      the k likeliest next tokens at every place, and
        log_p     [n, T, k]   float32    their log-probabilities
        log_tail  [n, T]      float32    log of the probability of all others together
        states.7  [n, T, D]   bfloat16   the residual stream behind teacher layer 7, for the layers asked for

A block is found by its tokens alone (where documents share it, by their positions too), whatever the order, the batch,
the epoch or the rank. Log-probabilities are float32, because float16 would cost equality with a run that has the
teacher and save a third of what is little beside the states. States are bfloat16: what a teacher in bfloat16 computes
is stored exactly, and streams that leave float16's range (65504) exist. Legend: `B` batch, `T` tokens, `D` hidden,
`k` tokens that are kept.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcprune import files, identity
from lcprune.distillation.buckets import Buckets
from lcprune.distillation.levels import Labels, Level, Logits, only
from lcprune.errors import InputError
from lcprune.merging.calibration import Batch

FORMAT = 1
"""Version of the layout; a reader refuses any other."""
MANIFEST = "manifest.json"
SEAL = "sha256"
"""Where in a manifest the hash of all the rest is."""
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")  # no path: nothing outside the folder is opened
KEY_BYTES = 16
"""Of a block's hash: among 2**40 blocks two are alike with a probability of 2**-49."""


@runtime_checkable
class TrainingBlocks(Protocol):
    """A data module that can say which blocks it trains on."""

    def training_blocks(self) -> Tensor:
        """Every block of the training text, whatever order they are trained on in, as `rows_of` has them."""


@dataclass(frozen=True)
class Origin:
    """What a cache is made from and holds: equal origins give equal caches."""

    teacher: str
    """Hash of its config and weights."""
    vocabulary: str
    """Hash of what the token ids stand for."""
    dtype: str
    """In which it computed."""
    blocks: int
    """How many different blocks there are."""
    block_size: int
    """Tokens in a block, T."""
    keys: str
    """Hash of all their hashes, in order."""
    batch_size: int
    """How many went through the teacher at once; sums may be rounded otherwise in another."""
    top_k: int
    """Likeliest tokens that are kept for every token of the text."""
    layers: tuple[int, ...]
    """Teacher layers behind which the stream is kept, in order."""

    def differences(self, other: "Origin") -> list[str]:
        """What is not the same, in words."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return [
            f"{name} {mine} and not {theirs}" if len(f"{mine}{theirs}") < 40 else f"another {name}"
            for name, mine, theirs in pairs
            if mine != theirs
        ]


@dataclass(frozen=True)
class Shard:
    """A file of a cache."""

    file: str
    """Its name in the folder."""
    blocks: int
    """How many it holds."""
    sha256: str
    """Of the whole file."""
    tail: float
    """Mean probability that the teacher gives to all tokens that are not kept."""


@dataclass(frozen=True)
class Manifest:
    """What lies in a cache's folder."""

    origin: Origin
    """What it is made from."""
    shards: tuple[Shard, ...] = ()
    """The files that are whole, in order."""

    @property
    def done(self) -> int:
        """How many blocks they hold."""
        return sum(shard.blocks for shard in self.shards)

    @property
    def tail(self) -> float:
        """Mean probability, over all blocks, of what is not kept."""
        return sum(shard.tail * shard.blocks for shard in self.shards) / max(self.done, 1)

    def to_json(self) -> str:
        """Text of the file."""
        content = {"format": FORMAT, **asdict(self.origin), "shards": [asdict(shard) for shard in self.shards]}
        return json.dumps({**content, SEAL: _hash_of(content)}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            InputError: There is none, or this version cannot read it.
        """
        file = folder / MANIFEST
        if not file.is_file():
            raise InputError(
                f"teacher cache {folder} holds no {MANIFEST}: fill it with `lcprune cache --config RECIPE "
                f"--out {folder}`."
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            seal = content.pop(SEAL, None)  # the first caches had none
            if seal is not None and seal != _hash_of(content):
                raise ValueError(f"its {SEAL} differs")
            version = content.pop("format")
            if version == FORMAT:
                shards = tuple(Shard(**shard) for shard in content.pop("shards"))
                manifest = cls(Origin(**{**content, "layers": tuple(content["layers"])}), shards)
                _check_types(manifest)
                return manifest
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{file} is not the manifest of a teacher cache ({error}): delete {folder} and make it again."
            ) from error
        raise InputError(f"{file} has format {version!r}, this version reads {FORMAT}: make the cache again.")


def _hash_of(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


_KINDS: dict[object, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,)}


def _check_types(manifest: Manifest) -> None:
    """Raises ValueError for values that no cache was ever written with."""
    parts: tuple[Origin | Shard, ...] = (manifest.origin, *manifest.shards)
    values = [(each, getattr(part, each.name)) for part in parts for each in fields(part)]
    wrong = [(each.name, value) for each, value in values if not isinstance(value, _KINDS.get(each.type, (tuple,)))]
    numbers = [(each.name, value) for each, value in values if isinstance(value, int | float)]
    numbers += [("layers", layer) for layer in manifest.origin.layers]
    wrong += [(name, value) for name, value in numbers if isinstance(value, bool | str) or not 0 <= value < 2**63]
    wrong += [("file", shard.file) for shard in manifest.shards if not _SHARD.fullmatch(str(shard.file))]
    if wrong:
        raise ValueError(f"{wrong[0][0]}={wrong[0][1]!r}")


@dataclass(frozen=True)
class Found:
    """What a cache says about a batch."""

    buckets: Buckets
    """The teacher's next-token distribution [B, T]."""
    states: Mapping[int, Tensor]
    """Teacher layer -> the stream [B, T, D] behind it."""


class TeacherCache:
    """A finished cache, mapped into memory: what is not looked up is not read a second time."""

    def __init__(self, folder: Path) -> None:
        """Opens every shard and compares its checksum.

        Raises:
            InputError: The folder holds no finished cache, or a shard is not as it was written.
        """
        self.folder = folder
        self.manifest = Manifest.read(folder)
        origin = self.manifest.origin
        if self.manifest.done != origin.blocks:
            raise InputError(
                f"teacher cache {folder} has {self.manifest.done} of {origin.blocks} blocks: run the same "
                "`lcprune cache` again, it goes on where it was stopped."
            )
        self._shards = [self._opened(shard) for shard in self.manifest.shards]
        self._places = {
            key.numpy().tobytes(): (number, row)
            for number, shard in enumerate(self._shards)
            for row, key in enumerate(shard["keys"])
        }

    @classmethod
    def fitting(cls, folder: Path, teacher: str) -> "TeacherCache":
        """The cache in a folder, for a run; whether it has the run's text is for `check_blocks` to say.

        Args:
            folder: Of the cache.
            teacher: Name of the model that must have made it.

        Raises:
            InputError: The cache is not finished, damaged, or of another teacher or tokenizer.
        """
        cache = cls(folder)
        cache.check_teacher(teacher)
        origin = cache.manifest.origin
        states = f", states of layers {_listed(origin.layers)}" if origin.layers else ""
        rank_zero_info(
            f"teacher cache {folder}: the likeliest {origin.top_k} tokens of the teacher in {origin.dtype}, "
            f"{1 - cache.manifest.tail:.2%} of the probability{states}; the teacher does not run on training batches"
        )
        return cache

    def __deepcopy__(self, memo: dict[int, object]) -> "TeacherCache":
        return self

    def _opened(self, shard: Shard) -> dict[str, Tensor]:
        path = self.folder / shard.file
        if not is_whole(self.folder, shard):
            raise InputError(
                f"{path} is missing or not as it was written (its checksum differs): run the same `lcprune cache` "
                "again, it makes what is damaged anew."
            )
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file ({error}): make the cache again.") from error

    def check_teacher(self, name: str) -> None:
        """Raises InputError unless the cache is of this model and its tokenizer."""
        origin = self.manifest.origin
        if identity.weights_of(name) != origin.teacher:
            raise InputError(
                f"model.teacher_cache={self.folder} was made by another teacher than model.teacher={name!r} (config or "
                "weights differ): name that one, or make a cache of this one in another folder."
            )
        if identity.vocabulary_of(name) != origin.vocabulary:
            raise InputError(
                f"model.teacher_cache={self.folder} was made with another tokenizer than that of {name!r}: name the "
                "model it was made with, or make the cache anew in another folder."
            )

    def check_blocks(self, blocks: Tensor) -> None:
        """Raises InputError unless every one of these blocks, as `rows_of` has them, is in the cache."""
        missing = sum(key not in self._places for key in keys_of(blocks))
        if missing:
            origin = self.manifest.origin
            raise InputError(
                f"model.teacher_cache={self.folder} lacks {missing} of the recipe's {len(blocks)} training blocks of "
                f"{blocks.shape[-1]} tokens (it has {origin.blocks} of {origin.block_size}): give the data settings it "
                "was made with, or run `lcprune cache` with this recipe into another folder."
            )

    def check_states(self, needed: Collection[int]) -> None:
        """Raises InputError unless the stream behind all these teacher layers is in the cache."""
        kept = self.manifest.origin.layers
        missing = sorted(set(needed) - set(kept))
        if missing:
            raise InputError(
                f"model.teacher_cache={self.folder} lacks the states of teacher layers {_listed(missing)}, which "
                f"Boundary or Local need (it has {_listed(kept) or 'none'}): run `lcprune cache` with "
                f"--layers {','.join(map(str, sorted({*kept, *needed})))} into another folder, or leave the level out."
            )

    def look_up(self, blocks: Tensor, layers: Iterable[int] = ()) -> Found:
        """What the teacher says about the blocks of a batch, on its device.

        Args:
            blocks: Whole ones, as `rows_of` has them.
            layers: Teacher layers whose states are wanted, of those that the cache has.

        Raises:
            InputError: A block is not in the cache.
        """
        places = [self._places.get(key) for key in keys_of(blocks)]
        if None in places:
            raise InputError(
                f"model.teacher_cache={self.folder} lacks a block of this batch: train on the blocks it was made of, "
                "without padding."
            )

        def stacked(name: str) -> Tensor:
            rows = [self._shards[place[0]][name][place[1]] for place in places if place is not None]
            return torch.stack(rows).to(blocks.device)

        return Found(
            Buckets(stacked("ids"), stacked("log_p"), stacked("log_tail")),
            {layer: stacked(f"states.{layer}") for layer in layers},
        )


def rows_of(batch: Batch) -> Tensor:
    """What a teacher is asked about: tokens [B, T], or with their positions [B, 2, T] where documents share a block."""
    if "position_ids" not in batch:
        return batch["input_ids"]
    return torch.stack([batch["input_ids"], batch["position_ids"]], dim=1)


def batch_of(rows: Tensor) -> Batch:
    """The batch that `rows_of` makes these of."""
    if rows.dim() == 2:
        return {"input_ids": rows}
    return {"input_ids": rows[:, 0], "position_ids": rows[:, 1]}


def keys_of(blocks: Tensor) -> list[bytes]:
    """The hash of every block's content; as `rows_of` has them, of any whole-number type and on any device."""
    rows = blocks.to("cpu", torch.int32).numpy()
    return [hashlib.blake2b(row.astype("<i4").tobytes(), digest_size=KEY_BYTES).digest() for row in rows]


def is_whole(folder: Path, shard: Shard) -> bool:
    """Whether a shard's file is there and as it was written."""
    path = folder / shard.file
    return path.is_file() and files.sha256_of(path) == shard.sha256


def check_levels(objectives: Sequence[Sequence[Level]]) -> None:
    """Raises InputError for levels that need the teacher's whole distribution, or nothing of it."""
    if all(isinstance(level, Labels) for levels in objectives for level in levels):
        raise InputError(
            "objective=[Labels] learns nothing from the teacher, a teacher cache would not be read: leave it out, or "
            "add Logits, Boundary or Local."
        )
    for logits in filter(None, (only(levels, Logits) for levels in objectives)):
        if logits.divergence == "forward_kl" and logits.temperature == 1:
            continue
        raise InputError(
            f"Logits with divergence={logits.divergence} and temperature={logits.temperature} needs the teacher's "
            "whole distribution, and a teacher cache has the likeliest tokens: take forward_kl at temperature 1, or "
            "train without a cache."
        )


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
