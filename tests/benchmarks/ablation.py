"""What each level is worth: `python tests/benchmarks/ablation.py short/ --path my.jsonl --text wiki.txt`.

    original                the teacher
    untrained               the student as it is in the folder
    local                   Local: every merged layer learns alone
    logits                  Logits
    boundary+logits         both
    local>boundary+logits   the first fifth of the steps Local, then both

    1, 2, 4 stages          from the teacher itself: OneShotRanking, Drop and RidgeRefit in so many merges over the
                            first half of the run, Boundary + Logits

Every variant begins with the same student and sees the same blocks in the same order: `--tokens` of them, or, with
`--seconds`, as many as it gets through (its own schedule is cut to that length by a few steps that are timed before).
`held_out` is the perplexity on the held-out part of the text that is trained on, `perplexity` that on the yardstick's
evaluation windows (yardstick.py), which are other text; both with float32 weights, under bfloat16 autocast or, with
`--dtype float32`, without: on CPUs that have no instructions for bfloat16 that is the faster one.
Figures are appended to --results and not measured again. The last line is one JSON object: variant -> figures.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune import Boundary, DistillationModule, Evenly, Local, Logits, ProgressiveCollapse, RidgeRefit, TextDataModule
from lcprune.demo import DEMO
from lcprune.distillation.levels import Level
from lcprune.distillation.optim import RewarmingCosine
from lcprune.distillation.phases import Phase
from lcprune.merging.calibration import Batch, evaluating, hidden_states, token_loss
from lcprune.merging.criteria import perplexity
from lcprune.models import load_tokenizer
from tests.benchmarks.results import Result, Results
from tests.benchmarks.yardstick import Yardstick

BOTH: list[Level] = [Logits(), Boundary(0.5)]
WARM_UP, TIMED = 10, 4
"""Optimizer steps: of the learning rate's warm-up, and how many are timed where seconds are given."""
STAGES = (1, 2, 4)
HELD_OUT = 8192
"""Tokens of the validation text, at most."""


@dataclass(frozen=True)
class Variant:
    """How a student is made and taught, given the number of steps."""

    phases: Callable[[int], list[Phase]]
    stages: int = 0
    """Merges from the teacher on; 0 = begins from the folder."""


VARIANTS: dict[str, Variant] = {
    "local": Variant(lambda steps: [Phase([Local()])]),
    "logits": Variant(lambda steps: [Phase([Logits()])]),
    "boundary+logits": Variant(lambda steps: [Phase(BOTH)]),
    "local>boundary+logits": Variant(lambda steps: [Phase([Local()], max(1, steps // 5)), Phase(BOTH)]),
} | {f"{stages} stages": Variant(lambda steps: [Phase(BOTH)], stages) for stages in STAGES}


class Bench:
    """What all variants have in common."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        text = given.text.read_text(encoding="utf-8")
        self.yardstick = Yardstick.of(text, load_tokenizer(given.teacher))

    @property
    def _in_bfloat16(self) -> bool:
        return self.given.dtype == "bfloat16"

    @cached_property
    def held_out(self) -> list[Batch]:
        """So much of the validation text."""
        data = self._data()
        data.setup("validate")
        return list(islice(data.val_dataloader(), HELD_OUT // (self.given.block_size * self.given.batch_size)))

    def judged(self, module: DistillationModule) -> Result:
        """The student on both texts, as it is trained: float32 weights, products in the type given."""
        loss, count = 0.0, 0
        with torch.autocast("cpu", torch.bfloat16, enabled=self._in_bfloat16), evaluating(module.student):
            for batch in self.held_out:
                batch_loss, tokens = token_loss(module.student, hidden_states(module.student, batch), batch)
                loss, count = loss + batch_loss, count + tokens
            return {"held_out": perplexity(loss, count), "perplexity": self.yardstick.perplexity(module.student)}

    def untrained(self, student: Path | None) -> Result:
        """The student in a folder; None = the teacher."""
        module = DistillationModule(teacher=self.given.teacher, student=student)
        module.configure_model()
        return {**self.judged(module), "tokens": 0, "seconds": 0.0}

    def measure(self, name: str) -> Result:
        """Trains a variant and measures it."""
        variant, per_step = VARIANTS[name], self.given.block_size * self.given.batch_size
        steps = self.given.tokens // per_step
        if self.given.seconds:
            steps = max(WARM_UP + 1, int(self.given.seconds / self._seconds_per_step(variant)))
        began = time.perf_counter()
        module = self._train(variant, steps)
        seconds = time.perf_counter() - began
        return {**self.judged(module), "tokens": steps * per_step, "seconds": round(seconds, 1)}

    def _seconds_per_step(self, variant: Variant) -> float:
        """Mean over the phases, each for its share of the steps."""
        long = 1000
        phases = variant.phases(long)
        total = 0.0
        for phase in phases:
            alone = Variant(lambda steps, phase=phase: [Phase(phase.objective)], variant.stages)
            clock = _Clock()
            self._train(alone, WARM_UP + TIMED, clock)
            share = 1.0 if len(phases) == 1 else (phase.steps or long - sum(one.steps or 0 for one in phases)) / long
            total += share * clock.per_step
        return total

    def _train(self, variant: Variant, steps: int, *callbacks: Callback) -> DistillationModule:
        seed_everything(0, verbose=False)
        module = self._module(variant, steps)
        collapse = []
        if variant.stages:
            last = 0 if variant.stages == 1 else steps // 2
            schedule = Evenly(self._depth(), merges=variant.stages, first=0, last=last)
            collapse = [ProgressiveCollapse(schedule, refit=RidgeRefit())]
        trainer = Trainer(
            accelerator="cpu",
            precision="bf16-mixed" if self._in_bfloat16 else "32-true",
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*collapse, *callbacks],
        )
        trainer.fit(module, datamodule=self._data())
        return module

    def _module(self, variant: Variant, steps: int) -> DistillationModule:
        return DistillationModule(
            teacher=self.given.teacher,
            student=None if variant.stages else self.given.student,
            phases=variant.phases(steps),
            phases_begin="run",
            train="layers",
            optimizer=partial(torch.optim.AdamW, lr=self.given.lr, weight_decay=0.0),
            lr_scheduler=partial(RewarmingCosine, warmup_steps=WARM_UP, rewarm_steps=5),
        )

    def _data(self) -> TextDataModule:
        return TextDataModule(
            tokenizer=self.given.teacher,
            path=self.given.path,
            block_size=self.given.block_size,
            batch_size=self.given.batch_size,
            calibration_blocks=self.given.calibration_blocks,
        )

    def _depth(self) -> int:
        return int(json.loads((self.given.student / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])


class _Clock(Callback):
    """Seconds per optimizer step, behind the first ones."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def on_train_batch_end(self, *args: object, **kwargs: object) -> None:
        self._times.append(time.perf_counter())

    @property
    def per_step(self) -> float:
        """Over the last `TIMED` steps."""
        return (self._times[-1] - self._times[-1 - TIMED]) / TIMED


def main() -> None:
    """Measures what is not known yet, prints figures as they come, then a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="folder of the merged student, as lcprune collapse wrote it")
    parser.add_argument("--teacher", default=DEMO)
    parser.add_argument("--path", type=Path, required=True, help="text to train on")
    parser.add_argument("--text", type=Path, required=True, help="the WikiText-2 validation text, to judge by")
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--seconds", type=float, default=0.0, help="of training, instead of --tokens")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--calibration-blocks", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of products")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--results", type=Path, help="JSON lines: figures are read from there and appended")
    given = parser.parse_args()
    deciding = ("teacher", "student", "path", "tokens", "seconds", "lr", "block_size", "batch_size", "dtype")
    results = Results(given.results, {"given": {name: str(getattr(given, name)) for name in deciding}})
    bench = Bench(given)
    found = {}
    measures: dict[str, Callable[[], Result]] = {
        "original": lambda: bench.untrained(None),
        "untrained": lambda: bench.untrained(given.student),
        **{name: partial(bench.measure, name) for name in given.variants},
    }
    for name, measure in measures.items():
        if results.get(name) is None:
            results.add(name, measure())
        found[name] = results.get(name)
        print(f"{name:24} {found[name]}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
