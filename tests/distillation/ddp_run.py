"""Two processes train one student through two merges and say what each of them has: `ddp_run.py FOLDER TEACHER TEXT`.

The planner answers otherwise on every rank, as floating-point noise could make a real one: only rank 0's may count.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lcprune.merging.calibration import Calibration
from lcprune.merging.lineage import MergeStep
from lcprune.merging.operators import Operator, WeightedAverage, spec_of
from lcprune.merging.planners import Planner
from tests.distillation import runs


@dataclass(frozen=True)
class OwnMind(Planner):
    """Rank 0 merges layers 1 and 2, rank 1 would merge 2 and 3."""

    def plan(self, calibration: Calibration, operator: Operator, target: int) -> tuple[MergeStep, ...]:
        """One pair, by rank."""
        first = 1 + int(os.environ.get("LOCAL_RANK", "0"))
        return (MergeStep((first, first + 1), spec_of(operator), (0.5, 0.5)),)


def main(folder: Path, teacher: Path, text: Path) -> None:
    """Trains, then writes `rank0.json` and `rank1.json`."""
    module, losses = runs.student_of(teacher), runs.Losses()
    collapse = runs.two_merges(planner=OwnMind(), operator=WeightedAverage())
    trainer = runs.trainer_for(
        folder, collapse, losses, runs.checkpoints_in(folder), strategy="ddp", devices=2, max_steps=10
    )
    trainer.fit(module, datamodule=runs.data_for(teacher, text))
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    held = [len(group["params"]) for group in trainer.optimizers[0].param_groups]
    wrapped = sum(1 for _ in trainer.strategy.model.parameters())
    rank = {
        "rank": trainer.global_rank,
        "weights": digest.hexdigest(),
        "history": module.history.digest,
        "groups": [step.group for step in module.history.steps],
        "losses": losses.seen,
        "held": held,
        "wrapped": wrapped,
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(rank), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:4]))
