"""What a distillation step costs: `python tests/benchmarks/step.py [--random llama-3.2-1b --device cuda]`.

    plain          transformers' own: teacher forward to logits, student forward with labels (cross-entropy), backward
    all            ours: Logits + Boundary, everything trains
    after_merge    the same, every layer from the first merged one on trains; what is before runs once for both
    local          ours: Local, every merged layer learns alone

    overhead_ratio = all / plain     after_merge_speedup = all / after_merge     local_speedup = all / local

All on the same teacher, the same student (a fifth of the layers merged: pairs of neighbours from layer 12 of 30, or as
far up in a model of another depth), batch, dtypes and autocast, each pair of steps in alternation in one process, so
that whatever else the machine does meets both. The optimizer's step is in none. Every figure is the median over repeats
of the quotient; the last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune import Boundary, Calibration, DistillationModule, Drop, FixedPlan, Local, Logits
from lcprune.distillation.levels import Level
from lcprune.distillation.objectives import with_scored
from lcprune.distillation.trained import Trained
from lcprune.merging import surgery
from lcprune.merging.calibration import Batch
from tests.benchmarks.shapes import add_arguments, pairs, parsed, teacher_of

Step = Callable[[], torch.Tensor]
SETTINGS: dict[str, tuple[list[Level], Trained]] = {
    "all": ([Logits(), Boundary()], "all"),
    "after_merge": ([Logits(), Boundary()], "after_merge"),
    "local": ([Local()], "all"),
}


class Bench:
    """One teacher, one batch, and modules that differ in nothing but their settings."""

    def __init__(self, model: str, given: argparse.Namespace) -> None:
        self.model, self.given = model, given
        config = DistillationModule(teacher=model).teacher_config
        depth = config.num_hidden_layers
        target = given.depth or round(depth * 24 / 30)
        self.groups = pairs(depth, target, round(depth * 12 / 30) if given.first is None else given.first)
        length = min(given.block_size, given.tokens)
        input_ids = torch.randint(config.vocab_size, (given.tokens // length, length), device=given.device)
        self.batch: Batch = {"input_ids": input_ids, "labels": input_ids.clone()}
        # As the data module makes it, before the batch moves to a GPU.
        self.known = with_scored(self.batch)

    def module(self, name: str) -> DistillationModule:
        """A merged module of one of the settings, on the device."""
        objective, train = SETTINGS[name]
        module = DistillationModule(
            teacher=self.model,
            objective=objective,
            train=train,
            teacher_dtype=self.given.dtype,
            dtype="float32",
            kernels=self.given.kernels,
        )
        module.configure_model()
        assert module.teacher is not None
        module.teacher.model.to(self.given.device)
        module.to(self.given.device)
        module.log = module.log_dict = lambda *_, **__: None  # type: ignore[assignment]  # there is no trainer
        depth = module.history.depth - len(self.groups)
        steps = FixedPlan(self.groups).plan(Calibration(module.student, [self.batch]), Drop(), depth)
        surgery.apply_all(module.student, steps)
        module.history = module.history.extend(steps)
        module.choose_trained()
        return module

    def ours(self, module: DistillationModule) -> Step:
        """A step of ours, to its loss."""

        def step() -> torch.Tensor:
            with self._autocast():
                return module.training_step(self.known, 0)

        return step

    def plain(self, module: DistillationModule) -> Step:
        """The same models as transformers runs them."""

        def step() -> torch.Tensor:
            assert module.teacher is not None
            with torch.no_grad(), torch.autocast(self.given.device, enabled=False):
                _ = module.teacher.model(input_ids=self.batch["input_ids"], use_cache=False).logits
            with self._autocast():
                return module.student(**self.batch, use_cache=False).loss

        return step

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.given.device, dtype=torch.bfloat16, enabled=self.given.dtype == "bfloat16")

    def seconds(self, step: Step, module: DistillationModule) -> float:
        """Time of one forward and backward pass, gradients dropped afterwards."""
        self._wait()
        begin = time.perf_counter()
        step().backward()
        self._wait()
        taken = time.perf_counter() - begin
        module.zero_grad(set_to_none=True)
        return taken

    def _wait(self) -> None:
        if self.given.device == "cuda":
            torch.cuda.synchronize()

    def in_turn(self, *steps: tuple[Step, DistillationModule]) -> list[list[float]]:
        """Seconds of each, once per repeat, after one that warms up."""
        for step in steps:
            self.seconds(*step)
        rows = [[self.seconds(*step) for step in steps] for _ in range(self.given.repeats)]
        return [list(column) for column in zip(*rows, strict=True)]


def quotient(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over repeats."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 4)


def measure(bench: Bench) -> dict[str, object]:
    """The three figures and the seconds behind them."""
    everything = bench.module("all")
    mine, plain = bench.in_turn((bench.ours(everything), everything), (bench.plain(everything), everything))
    result: dict[str, object] = {"overhead_ratio": quotient(mine, plain)}
    seconds = {"step_s": mine, "plain_s": plain}
    for name in ("after_merge", "local"):
        other = bench.module(name)
        mine, theirs = bench.in_turn((bench.ours(everything), everything), (bench.ours(other), other))
        result[f"{name}_speedup"] = quotient(mine, theirs)
        seconds[f"{name}_s"] = theirs
        del other
    return result | {name: round(statistics.median(values), 4) for name, values in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=512, help="tokens in a batch")
    parser.add_argument("--kernels", choices=["torch", "liger"], default="torch", help="of ours alone")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of steps that are timed")
    given = parsed(parser, arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(teacher_of(given, Path(folder)), given)
        result = measure(bench)
    result |= {
        "model": given.random or given.model,
        "merged": f"{len(bench.groups)} pairs from layer {bench.groups[0][0]}",
        "tokens": int(bench.batch["input_ids"].numel()),
        "dtype": given.dtype,
        "kernels": given.kernels,
        "device": torch.cuda.get_device_name() if given.device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
