"""A checkpoint file is whole or not there, and a damaged one is noticed before anything is loaded."""

import errno
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lcprune.distillation.storing import META, SHARDS, AtomicCheckpointIO, check_whole, damage, newest_whole
from lcprune.errors import DiskError, InputError

CONTENT = {"a": torch.arange(3000.0), "b": [1, 2, {"x": "y"}], "c": torch.arange(7)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def _same(content: dict[str, object]) -> bool:
    return all(torch.equal(content[name], CONTENT[name]) for name in "ac") and content["b"] == CONTENT["b"]


def test_checkpoint_comes_back_and_lies_alone_in_its_folder(saved: Path):
    assert _same(AtomicCheckpointIO().load_checkpoint(saved))
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_checkpoint_of_the_trainers_own_writer_is_known_to_be_whole(tmp_path: Path):
    torch.save(CONTENT, tmp_path / "plain.ckpt")
    assert damage(tmp_path / "plain.ckpt") is None


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bit_is_noticed_or_changes_nothing(saved: Path, seed: int):
    whole, chance = saved.read_bytes(), random.Random(seed)
    noticed = 0
    for _ in range(150):
        altered = bytearray(whole)
        altered[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        saved.write_bytes(altered)
        if damage(saved) is None:
            try:
                assert _same(torch.load(saved, weights_only=True))
            except (RuntimeError, ValueError):
                continue  # torch refuses what is wrong with its own marks
        else:
            noticed += 1
    assert noticed > 100  # most of the file are weights


@pytest.mark.parametrize("kept", [0, 1, 0.25, 0.5, 0.999])
def test_truncated_file_is_noticed(saved: Path, kept: float):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(kept * len(whole)) if kept != 1 else -1])
    with pytest.raises(InputError, match="not a whole checkpoint"):
        AtomicCheckpointIO().load_checkpoint(saved)


def _older(path: Path, seconds: float) -> Path:
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def _copy(path: Path, name: str, seconds: float) -> Path:
    path.with_name(name).write_bytes(path.read_bytes())
    return _older(path.with_name(name), seconds)


def _spoil(path: Path) -> Path:
    seconds = path.stat().st_mtime
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff\x00\xff")
    os.utime(path, (seconds, seconds))
    return path


def test_error_names_the_newest_whole_one_beside(saved: Path):
    _copy(saved, "step=2.ckpt", 30)
    newest = _copy(saved, "step=4.ckpt", 20)
    _spoil(_copy(saved, "step=6.ckpt", 10))
    with pytest.raises(InputError, match=rf"checksum of .* is wrong.*newest whole one in its folder is {newest}"):
        check_whole(_spoil(saved))


def test_error_names_a_whole_one_that_a_metric_in_its_name_has_put_into_a_folder(saved: Path):
    newest = saved.parent / "step=6-val" / "perplexity=2.0.ckpt"
    newest.parent.mkdir()
    newest.write_bytes(saved.read_bytes())
    with pytest.raises(InputError, match=rf"newest whole one in its folder is {newest}"):
        check_whole(_spoil(saved))


def test_error_says_that_no_other_is_whole(saved: Path):
    _spoil(_copy(saved, "step=4.ckpt", 10))
    with pytest.raises(InputError, match="no other in its folder is, name another one"):
        check_whole(_spoil(saved))


def test_newest_whole_one_comes_with_the_damaged_ones_that_are_newer(saved: Path):
    whole = _copy(saved, "b.ckpt", 20)
    _spoil(_copy(saved, "c.ckpt", 30))
    _spoil(saved)
    assert newest_whole(saved.parent) == (whole, [saved])
    assert newest_whole(saved.parent / "nowhere") == (None, [])


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """How many bytes a file may have inside: the kernel refuses the next, as it does where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:  # before the test ends, for pytest may write what it says to a file too
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 5000])
def test_write_that_the_disk_refuses_leaves_the_earlier_checkpoint(saved: Path, limit: int):
    before = saved.read_bytes()
    refused = pytest.raises(DiskError, match=r"last.ckpt cannot be written \(File too large\).*--ckpt_path last")
    with refused, small_files(limit):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(9000)}, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_full_disk_at_the_last_moment_leaves_the_earlier_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(9)}, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_error_that_is_not_the_disks_stays_what_it_is(tmp_path: Path):
    class Refuses:
        def __reduce__(self) -> tuple[object, ...]:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        AtomicCheckpointIO().save_checkpoint({"a": Refuses()}, tmp_path / "last.ckpt")
    assert not any(tmp_path.iterdir())


def test_partial_file_that_a_killed_process_left_goes_with_the_next_checkpoint(saved: Path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = saved.with_name(f".step=9.ckpt.tmp-{gone.pid}")
    fresh = saved.with_name(f".step=8.ckpt.tmp-{gone.pid}")
    alive = saved.with_name(f".step=7.ckpt.tmp-{os.getppid()}")
    for path in (left, fresh, alive):
        path.write_bytes(b"half")
    _older(left, 100)
    _older(alive, 100)
    AtomicCheckpointIO().save_checkpoint(CONTENT, saved)
    assert {path.name for path in saved.parent.iterdir()} == {saved.name, fresh.name, alive.name}


def test_checkpoint_is_read_as_plain_data(tmp_path: Path):
    torch.save({"path": tmp_path}, tmp_path / "pickled.ckpt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "pickled.ckpt")
    with pytest.raises(InputError, match="weights_only=False would run what a stranger has pickled"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "pickled.ckpt", weights_only=False)


def test_file_that_is_not_local_goes_lightnings_way():
    AtomicCheckpointIO().save_checkpoint(CONTENT, "memory://run/last.ckpt")
    assert _same(AtomicCheckpointIO().load_checkpoint("memory://run/last.ckpt"))


@pytest.mark.parametrize(("files", "whole"), [((META, SHARDS), True), ((META,), False), ((SHARDS,), None)])
def test_checkpoint_in_shards_is_whole_once_it_says_where_they_belong(
    tmp_path: Path, files: tuple[str, ...], whole: bool | None
):
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    for name in files:
        with (folder / name).open("wb") as file:
            torch.save(CONTENT, file)
    assert newest_whole(tmp_path) == {True: (folder, []), False: (None, [folder]), None: (None, [])}[whole]
