"""Checkpoints that are whole or not there, and known to be whole when they are read.

    .last.ckpt.tmp-4711   every record with its CRC-32, written through to the disk
          |  renamed: one indivisible act
          v
    last.ckpt             before anything is loaded, every record is compared with its CRC-32

`torch.save` has written those checksums all along (its format is a zip archive), `torch.load` does not look at them:
a flipped bit would become a wrong weight. Lightning's own writer holds a second copy of the checkpoint in memory and
moves it from /tmp, which across file systems is a copy that can be torn.
"""

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lcprune.errors import DiskError, InputError, reason
from lcprune.files import left_behind, replacing

SUFFIX = ".ckpt"
"""Of every checkpoint file."""
META, SHARDS = "meta.pt", ".metadata"
"""In the folder of a checkpoint in shards: everything else, and where the shards' pieces belong."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoint files, with the guarantees above: `Trainer(plugins=[...])`.

    The command line adds it by itself. Files that are not local go Lightning's way, unchecked.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes beside, then renames; whatever fails leaves the earlier file as it was and nothing beside it.

        Raises:
            DiskError: The disk is full or may not be written.
        """
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        for left in left_behind(path.parent, f"*{SUFFIX}"):
            left.unlink(missing_ok=True)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # Where a write fails, torch.save dies of its own archive's confusion, the cause behind it.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise DiskError(
                f"The checkpoint {path} cannot be written ({cause.strerror or cause}); nothing was left behind and "
                "what was there is as it was: make room, then go on with --ckpt_path last."
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads plain data, once it is known to be whole.

        Raises:
            InputError: The file is damaged, and the message names the newest whole one beside it; or it is not to be
                read as plain data.
        """
        if weights_only is False:
            raise InputError(
                f"weights_only=False would run what a stranger has pickled into {path}: leave it out, our checkpoints "
                "hold plain data."
            )
        if not _is_local(path):
            with get_filesystem(path).open(str(path), "rb") as file:
                return torch.load(file, map_location=map_location, weights_only=True)
        check_whole(Path(path))
        return torch.load(path, map_location=map_location, weights_only=True)


def check_whole(path: Path) -> None:
    """Compares every record of a checkpoint file with its checksum; about a second per gigabyte.

    Raises:
        InputError: The file is truncated, altered or no checkpoint; the message names the newest whole one beside it.
    """
    found = damage(path)
    if found is None:
        return
    whole = newest_whole(path.parent, but=path)[0]
    instead = (
        f"the newest whole one in its folder is {whole}, name that"
        if whole
        else "no other in its folder is, name another one"
    )
    raise InputError(f"ckpt_path={path} cannot be read, it is not a whole checkpoint ({found}): {instead}.")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None = nothing.

    Args:
        path: A file, or a folder with one in shards, of which only what is not in shards has checksums.
    """
    if path.is_dir():
        # Written last: what says where the pieces of every tensor are.
        return damage(path / META) if (path / SHARDS).is_file() else f"{SHARDS} is missing, so it was not written whole"
    at = path.stat() if path.exists() else None
    return _damage(path, *((at.st_size, at.st_mtime_ns) if at else (0, 0)))


@lru_cache
def _damage(path: Path, size: int, written: int) -> str | None:
    """Looked at once: every reader asks, and eight billion parameters take minutes."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError) as error:
        # A bit in a header can ask for a password, a compression or an encoding that was never there.
        return reason(error)[:120]
    return None if wrong is None else f"the checksum of {wrong} is wrong"


def newest_whole(folder: Path, but: Path | None = None) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint in a folder, or in one right below it, that is whole, and the damaged ones that are newer.

    Args:
        folder: It need not exist. A metric's name in that of a checkpoint, such as val/perplexity, makes folders below.
        but: One that is left out.
    """
    paths = [*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*/*{SUFFIX}")]
    return first_whole(path for path in paths if but is None or not _same_file(path, but))


def first_whole(paths: Iterable[Path]) -> tuple[Path | None, list[Path]]:
    """As `newest_whole`, among these files."""
    skipped: list[Path] = []
    for path in sorted((path for path in paths if _is_checkpoint(path)), key=_written, reverse=True):
        if damage(path) is None:
            return path, skipped
        skipped.append(path)
    return None, skipped


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() or (path / META).is_file()


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _same_file(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _is_local(path: str | Path) -> bool:
    return "://" not in str(path)
