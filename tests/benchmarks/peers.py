"""Beside what users would take instead: `python tests/benchmarks/peers.py [--random llama-3.2-1b --device cuda]`.

    pip install -e ".[peers]"

trl, nvidia-modelopt and optipfair distil the same student from the same teacher: same blocks, types, loss, optimizer
and clipping (contestants.py says how). Every figure comes from a process of its own, all in turn in every round, so
that whatever else the machine does meets all. A peer that does not run is named with its error and does not count.

    seconds       median step, from optimizer step to optimizer step, data, clipping and AdamW included
    memory        peak while training, weights and optimizer included: the allocator's on CUDA; on CPUs the process's
                  beyond what it held before it had a model, in a round of its own in which glibc gives freed memory
                  back at once, or it would be that of the heap's holes

`time_ratio`, `time_ratio_after_merge` and `memory_ratio` are ours over the best peer of the same round, the median over
rounds. The last line is one JSON object. `--tiny` is for a try-out: its figures say nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune import Calibration, Drop, FixedPlan
from lcprune.merging import surgery
from lcprune.models import resolve
from tests.benchmarks import shapes
from tests.benchmarks.contestants import CONTESTANTS, Work
from tests.benchmarks.shapes import add_arguments, pairs, teacher_of

OURS = ("ours", "ours_after_merge")
DISTRIBUTIONS = ("trl", "nvidia-modelopt", "optipfair", "transformers", "torch")
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
"""What makes glibc give memory back as soon as it is free; pages are then made anew every time, which takes time."""
TINY = {"random": "llama-3.2-1b", "layers": 10, "hidden": 64, "vocabulary": 512, "block_size": 32, "steps": 2}

Round = dict[str, Mapping[str, float]]


def shortened(teacher: str, folder: Path, groups: list[list[int]]) -> Path:
    """The student as a folder, for those who cannot merge."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    depth = model.config.num_hidden_layers - len(groups)
    ids = torch.zeros(1, 8, dtype=torch.long)
    steps = FixedPlan(groups).plan(Calibration(model, [{"input_ids": ids}]), Drop(), depth)
    surgery.apply_all(model, steps)
    model.save_pretrained(folder)
    return folder


def elsewhere(name: str, work: Work, environment: Mapping[str, str]) -> Mapping[str, float] | str:
    """Figures of one, or why there are none."""
    script, settings = Path(__file__).with_name("contestants.py"), {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, str(script), name, work.argument()], capture_output=True, text=True, env=settings
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def race(
    names: Sequence[str], work: Work, rounds: int, environment: Mapping[str, str] | None = None
) -> tuple[list[Round], dict[str, str]]:
    """All in turn, round by round; those that failed once are left out from then on.

    Ctrl-C (`timeout -s INT`) ends it with what there is.
    """
    results: list[Round] = []
    failed: dict[str, str] = {}
    with suppress(KeyboardInterrupt):
        for number in range(rounds):
            results.append({})
            for name in (name for name in names if name not in failed):
                outcome = elsewhere(name, work, environment or {})
                if isinstance(outcome, str):
                    failed[name] = outcome
                    print(f"{name}: {outcome}", flush=True)
                    continue
                results[-1][name] = outcome
                seconds, memory = outcome["seconds"], outcome["memory_mb"]
                print(f"round {number + 1}  {name:18s} {seconds:9.4f} s {memory:9.1f} MB", flush=True)
    return results, failed


def ratio(rounds: Sequence[Round], name: str, figure: str) -> float | None:
    """Ours over the best peer of the same round, the median over rounds; None where there is nothing to compare."""
    quotients = []
    for results in rounds:
        peers = [figures[figure] for peer, figures in results.items() if peer not in OURS]
        if name in results and peers:
            quotients.append(results[name][figure] / min(peers))
    return round(statistics.median(quotients), 4) if quotients else None


def summary(timed: Sequence[Round], weighed: Sequence[Round]) -> dict[str, object]:
    """The ratios, and everyone's medians.

    Args:
        timed: Rounds whose seconds count.
        weighed: Rounds whose memory counts; perhaps the same.
    """
    sources = {"seconds": timed, "memory_mb": weighed}
    names = list(dict.fromkeys(name for results in timed for name in results))
    each = {
        name: {
            figure: round(statistics.median(results[name][figure] for results in rounds if name in results), 4)
            for figure, rounds in sources.items()
        }
        for name in names
    }
    return {
        "time_ratio": ratio(timed, "ours", "seconds"),
        "time_ratio_after_merge": ratio(timed, "ours_after_merge", "seconds"),
        "memory_ratio": ratio(weighed, "ours", "memory_mb"),
        "memory_ratio_after_merge": ratio(weighed, "ours_after_merge", "memory_mb"),
        "each": each,
    }


def versions() -> dict[str, str]:
    """Of what is compared, as far as it is there."""
    known = {distribution.metadata["Name"].lower(): distribution.version for distribution in metadata.distributions()}
    return {name: known[name] for name in DISTRIBUTIONS if name in known}


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=2, help="blocks in a batch")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, after two that are not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--activations", choices=["keep", "recompute"], default="keep", help="of all contestants")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, two steps")
    given = shapes.parsed(parser, arguments)
    for name, value in TINY.items() if given.tiny else ():
        setattr(given, name, value)
    return given


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    given = parsed(arguments)
    with tempfile.TemporaryDirectory() as folder:
        teacher = resolve(teacher_of(given, Path(folder) / "teacher"))
        depth = AutoConfig.from_pretrained(teacher).num_hidden_layers
        first = round(depth * 12 / 30) if given.first is None else given.first
        groups = pairs(depth, given.depth or round(depth * 24 / 30), first)
        work = Work(
            teacher,
            str(shortened(teacher, Path(folder) / "student", groups)),
            groups,
            batch_size=given.batch_size,
            block_size=given.block_size,
            steps=given.steps,
            device=given.device,
            dtype=given.dtype,
            activations=given.activations,
        )
        rounds, failed = race(given.only, work, given.rounds)
        weighed = rounds
        if given.device == "cpu":
            running = [name for name in given.only if name not in failed]
            weighed, _ = race(running, replace(work, steps=1), 1, GIVEN_BACK)
    result = summary(rounds, weighed) | {
        "failed": failed,
        "versions": versions(),
        "model": given.random or given.model,
        "merged": f"{len(groups)} pairs from layer {groups[0][0]}",
        "tokens": given.batch_size * given.block_size,
        "dtype": given.dtype,
        "activations": given.activations,
        "device": torch.cuda.get_device_name() if given.device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
