"""A run killed at random instants, again and again: `python tests/benchmarks/kills.py [--kills 50]`.

    whole      nobody stops it: its weights are what every other run has to end with
    killed     SIGKILL at an instant drawn from 1.5 times the length of a whole run, then on from the newest whole
               checkpoint, perhaps killed again; one that reaches its end is compared, and the next begins anew

Six layers of a tiny Llama with dropout become three in three merges, two phases after each, two micro-batches a step,
epochs that end within; a checkpoint at every step (`last.ckpt`, replaced) and at every second (kept). With several
(`--processes 2 --strategy fsdp`: FSDP2; `fsdp-distributed`: its checkpoints in shards too) one process is killed, and
the others must end by themselves. Processes are forked from one that has imported
everything, so a kill costs seconds. The last line is one JSON object.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning.pytorch.callbacks import ModelCheckpoint

from lcprune import AtSteps, Boundary, Local, Logits, OneShotRanking, Phase, ProgressiveCollapse
from lcprune.cli.ranks import end_with_launcher
from lcprune.distillation.storing import AtomicCheckpointIO, newest_whole
from lcprune.merging.operators import WeightedAverage
from tests.distillation import runs
from tests.distillation.ranks_run import full, strategy_of

ENDED = "weights"
"""File of a run that has reached its end: the hash of its weights."""
PATIENCE = 60.0
"""Seconds in which the other processes must have ended when one is killed."""


@dataclass
class Launched:
    """The processes of one run that is under way."""

    processes: list[int]
    """Children of this process: rank 0."""
    watched: list[int] = field(default_factory=list)
    """The other ranks, children of rank 0."""

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within so many seconds."""
        until = time.monotonic() + seconds
        while True:
            self.processes = [process for process in self.processes if not os.waitpid(process, os.WNOHANG)[0]]
            self.watched = [process for process in self.watched if _lives(process)]
            if not (left := self.processes + self.watched) or time.monotonic() > until:
                return not left
            time.sleep(0.01)

    def kill(self, chance: random.Random) -> float:
        """Kills one process; how long the others live on, in seconds."""
        begun = time.monotonic()
        os.kill(chance.choice(self.processes + self.watched), signal.SIGKILL)
        if not self.wait(PATIENCE):
            for process in self.processes + self.watched:
                os.kill(process, signal.SIGKILL)
            self.wait(PATIENCE)
            return float("inf")
        return time.monotonic() - begun


class Bench:
    """A folder with a teacher and a text, and what it takes to run on them."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.folder, self.given = folder, given
        self.teacher, self.text = folder / "teacher", folder / "text.txt"
        if not _in_a_child(self._prepare):
            raise SystemExit("no teacher could be made")

    def _prepare(self) -> None:
        runs.save_teacher(self.teacher, dropout=0.3)
        runs.write_text(self.folder, words=46 * self.given.processes)

    def start(self, folder: Path) -> Launched:
        """Begins a run in a folder, or goes on with the one that is there."""
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if self._ranks == 1:
            return Launched([_fork(lambda: self._train(folder, 0, port))])
        out, into = os.pipe()
        first = _fork(lambda: self._launch(folder, port, into))
        os.close(into)
        with os.fdopen(out) as pipe:
            return Launched([first], watched=[int(number) for number in pipe.readline().split()])

    def _launch(self, folder: Path, port: int, into: int) -> None:
        """Rank 0, which starts the others and watches them as Lightning's launcher does."""
        others = [_fork(lambda rank=rank: self._train(folder, rank, port)) for rank in range(1, self._ranks)]
        os.write(into, f"{' '.join(map(str, others))}\n".encode())
        os.close(into)
        for other in others:
            threading.Thread(target=_end_with, args=(other,), daemon=True).start()
        self._train(folder, 0, port)

    @property
    def _ranks(self) -> int:
        return int(self.given.processes)

    def _train(self, folder: Path, rank: int, port: int) -> None:
        settings: dict[str, object] = {}
        if self._ranks > 1:
            os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"NODE_RANK": "0", "WORLD_SIZE": str(self._ranks)}
            settings = {"strategy": strategy_of(self.given.strategy), "devices": self._ranks}
            end_with_launcher()
        torch.manual_seed(random.SystemRandom().randrange(2**31))  # all that matters must come from the checkpoint
        path, _ = newest_whole(folder)
        if path is None:
            torch.manual_seed(0)
        # DDP and FSDP want something to train before the merge at step 0, where Local has no merged layer yet.
        first = Local() if self._ranks == 1 else Logits()
        phases = [Phase([first], steps=1), Phase([Logits(), Boundary(0.5)])]
        module = runs.student_of(self.teacher, objective=None, phases=phases)
        kept = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=2, enable_version_counter=False)
        trainer = runs.trainer_for(
            folder,
            ProgressiveCollapse(AtSteps({0: 5, 4: 4, 8: 3}), planner=OneShotRanking(), operator=WeightedAverage()),
            runs.checkpoints_in(folder),
            kept,
            max_steps=11,
            accumulate_grad_batches=2,
            plugins=[AtomicCheckpointIO()],
            **settings,
        )
        data = runs.data_for(self.teacher, self.text, validation_fraction=0.15, validation_blocks=2)
        if path is not None:
            trainer.ckpt_path = str(path)  # FSDP2 has to know it before it loads
        trainer.fit(module, datamodule=data)
        digest = hashlib.sha256(module.history.digest.encode())
        for name, weight in runs.weights_of(module).items():
            digest.update(name.encode() + full(weight).numpy().tobytes())
        assert module.history.depth == 3
        (folder / f"{ENDED}{rank}").write_text(digest.hexdigest())

    def outcome(self, folder: Path) -> set[str]:
        """What the ranks of a run have ended with; empty if it has not ended."""
        files = [folder / f"{ENDED}{rank}" for rank in range(self._ranks)]
        return {file.read_text() for file in files} if all(file.exists() for file in files) else set()


def measure(bench: Bench) -> dict[str, object]:
    """All kills; how the runs ended that were killed."""
    chance, given = random.Random(bench.given.seed), bench.given
    begun = time.monotonic()
    whole = bench.start(bench.folder / "whole")
    if not whole.wait(600) or len(expected := bench.outcome(bench.folder / "whole")) != 1:
        raise SystemExit((bench.folder / "errors").read_text()[-3000:])
    length = time.monotonic() - begun
    counts: Counter[str] = Counter()
    behind: Counter[int] = Counter()
    slowest, equal, number = 0.0, True, 0
    while counts["kills"] < given.kills or counts["left"]:
        folder = bench.folder / f"run{number}"
        untouched, started = not folder.exists(), time.monotonic()
        run = bench.start(folder)
        counts["resumes"] += counts["left"]
        counts["left"] = 0
        if counts["kills"] < given.kills and not run.wait(chance.uniform(0, 1.5 * length)):
            slowest = max(slowest, run.kill(chance))
            counts["kills"] += 1
            counts["left"] = 1
            counts["torn"] += len(newest_whole(folder)[1])
            behind[_kept(folder)] += 1
            continue
        run.wait(600)
        outcome = bench.outcome(folder)
        if not outcome:
            raise SystemExit((bench.folder / "errors").read_text()[-3000:])
        if untouched:
            length = time.monotonic() - started  # the machine's pace may have changed
        equal &= outcome == expected
        counts["ends"] += 1
        number += 1
        print(f"{counts['kills']} kills, {counts['ends']} ends, equal: {equal}", flush=True)
    return {
        "kills": counts["kills"],
        "resumes": counts["resumes"],
        "ends": counts["ends"],
        "bitwise_equal": equal,
        "torn_checkpoints": counts["torn"],
        "kills_by_last_even_step": dict(sorted(behind.items())),
        "slowest_end_of_the_others": round(slowest, 1),
        "seconds_of_a_whole_run": round(length, 1),
    }


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _end_with(child: int) -> None:
    if os.waitpid(child, 0)[1]:
        os.kill(os.getpid(), signal.SIGKILL)


def _kept(folder: Path) -> int:
    """The last step whose checkpoint is kept."""
    return max((int(path.stem.partition("=")[2]) for path in folder.glob("step=*.ckpt")), default=0)


def _fork(work: object) -> int:
    """A process that does `work` and ends; its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        torch.set_num_threads(1)
        work()  # type: ignore[operator]
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _in_a_child(work: object) -> bool:
    return os.waitpid(_fork(work), 0)[1] == 0


def main(arguments: list[str] | None = None) -> None:
    """Kills and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many")
    parser.add_argument("--processes", type=int, default=1, help="of one run; one of them is killed")
    parser.add_argument(
        "--strategy", default="ddp", choices=["ddp", "fsdp", "fsdp-distributed"], help="of several processes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "errors"
        with errors.open("w") as file:
            real = os.dup(2)
            os.dup2(file.fileno(), 2)
            try:
                result = measure(Bench(Path(folder), given))
            finally:
                os.dup2(real, 2)
    print(json.dumps({**result, "processes": given.processes, "strategy": given.strategy, "seed": given.seed}))


if __name__ == "__main__":
    main()
