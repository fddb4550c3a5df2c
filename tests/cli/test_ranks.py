"""Runs of several processes: none outlives another, and all of them stop behind the same step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcprune.distillation.checkpoint import read
from lcprune.distillation.storing import newest_whole
from tests.cli.recipe import checkpointed

ROOT = Path(__file__).parents[2]


class Ranks:
    """A run of two processes, begun by Lightning's launcher as a user would."""

    def __init__(self, config: Path, *options: str) -> None:
        self.folder = config.parent / "run"
        self.first = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "lcprune", "fit", "--config", str(config), *options],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def wait_for(self, name: str) -> None:
        """Until a checkpoint is there."""
        until = time.monotonic() + 240
        while not (self.folder / "checkpoints" / name).exists():
            assert self.first.poll() is None, self.first.communicate()[1][-3000:]
            assert time.monotonic() < until
            time.sleep(0.05)

    @property
    def second(self) -> int:
        """The process of rank 1."""
        children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
        return next(int(child) for child in children if b"lcprune" in Path(f"/proc/{child}/cmdline").read_bytes())

    def strike(self, whom: str, number: int) -> int:
        """Sends a signal to the first or the second once both train, and returns the second."""
        self.wait_for("step=3.ckpt")
        first, second = self.first.pid, self.second
        os.kill({"first": first, "second": second}[whom], number)
        return second

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """Status and last words of the first."""
        try:
            words = self.first.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            self.first.kill()
            raise
        return self.first.returncode, words


def _gone(process: int, seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_rank_ends_when_its_launcher_is_gone():
    """With gloo an exchange breaks off at once; with NCCL a rank can wait in it: here it sleeps."""
    rank = "import time; from lcprune.cli.ranks import end_with_launcher as end; end(0.1); print('up', flush=True)"
    launcher = (
        "import os, subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {rank + '; time.sleep(100)'!r}], env=os.environ, stderr=2); "
        "print(p.pid, flush=True); p.wait()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", launcher],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    second = int(first.stdout.readline())
    assert first.stdout.readline() == "up\n"
    assert not _gone(second, 0.5)
    first.kill()
    assert _gone(second, 30)
    assert "rank 0 died" in first.communicate()[1]


TWO = {"trainer__devices": 2, "trainer__strategy": "ddp", "trainer__max_steps": 400, "trainer__max_epochs": -1}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "second"])
def test_rank_that_dies_takes_the_others_with_it_within_a_minute(tiny_folder: Path, tmp_path: Path, victim: str):
    ranks = Ranks(checkpointed(tiny_folder, tmp_path, **TWO))
    second = ranks.strike(victim, signal.SIGKILL)
    status, words = ranks.end()
    assert _gone(second)
    assert status != 0
    assert victim == "first" or "Traceback" not in words or "another rank broke off" in words
    assert newest_whole(tmp_path / "run" / "checkpoints")[0] is not None


@pytest.mark.slow
@pytest.mark.parametrize("told", ["first", "second"])
def test_sigterm_to_one_rank_stops_all_behind_the_same_step(tiny_folder: Path, tmp_path: Path, told: str):
    ranks = Ranks(checkpointed(tiny_folder, tmp_path, **TWO))
    second = ranks.strike(told, signal.SIGTERM)
    status, words = ranks.end()
    assert _gone(second)
    assert status == 143, words[-3000:]
    assert "stopped by SIGTERM after optimizer step" in words
    record = read(tmp_path / "run" / "checkpoints" / "sigterm.ckpt")
    assert (record.history.depth, len(record.rng)) == (4, 2)
