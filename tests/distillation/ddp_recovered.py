"""Two processes that measure otherwise decide alike: `ddp_recovered.py FOLDER TEACHER TEXT`.

Rank 1 finds every merge too dear and its validations nothing but gains: only what rank 0 measures may count. Averages
of the weights are kept beside.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from lcprune import AtSteps, Concat, FixedPlan, ProgressiveCollapse, RidgeRefit, WhenRecovered
from lcprune.distillation import merges
from tests.distillation import runs


class Gains(Callback):
    """Halves the perplexity that rank 1 believes in, every time. Stands before ProgressiveCollapse."""

    def __init__(self) -> None:
        self.factor = 1.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whoever asks for the metrics finds this."""
        if trainer.global_rank == 1:
            self.factor /= 1000
            trainer.callback_metrics["val/perplexity"].mul_(self.factor)


def main(folder: Path, teacher: Path, text: Path) -> None:
    """Trains, then writes `rank0.json` and `rank1.json`."""
    dear = iter([10.0, 99.0] * 9) if os.environ.get("LOCAL_RANK", "0") == "1" else iter([10.0, 10.0] * 9)
    merges.calibration_perplexity = lambda _: next(dear)
    collapse = ProgressiveCollapse(
        WhenRecovered(AtSteps({3: 5, 11: 4}), within=None, patience=1, min_gain=0.99),
        planner=FixedPlan([[1, 2], [3, 4]]),
        operator=Concat(),
        refit=RidgeRefit(),
        max_perplexity_jump=1.5,
    )
    module = runs.student_of(teacher)
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 12}
    trainer = runs.trainer_for(
        folder, EMAWeightAveraging(decay=0.5), Gains(), collapse, strategy="ddp", devices=2, **settings
    )
    trainer.fit(module, datamodule=runs.data_for(teacher, text))
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    rank = {
        "weights": digest.hexdigest(),
        "history": module.history.digest,
        "merged": [step.global_step for step in module.history.steps],
        "refused": module.standing.refused,
        "since": module.standing.since,
        "tokens": module.standing.tokens(),
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(rank), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:4]))
