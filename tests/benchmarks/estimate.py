"""How near `lcprune plan` comes to the truth: `python tests/benchmarks/estimate.py --config recipes/quickstart.yaml`.

    estimated    the peak that plan prints, from shapes alone
    measured     the most resident memory during optimizer steps 3 to 5, less what the process held before it loaded
                 anything; on CUDA the allocator's peak over those steps

Takes settings as `lcprune fit` does (default: the quickstart). Validation is off, and layers merge at step 0,
before anything is measured. ratio = estimated / measured; the last line is one JSON object.
"""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune import Evenly
from lcprune.cli.quiet import quieten
from lcprune.cli.training import RecipeCLI, collapse_of
from lcprune.distillation.forecast import Batches, forecast
from tests.benchmarks.memory import resident

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
STEPS = 5
WARM = 2
"""Optimizer steps before it is measured: the optimizer's state and the last gradients are there."""


class Peak(Callback):
    """Begins to look for the most memory once the first steps are over."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        """Forgets the peak so far."""
        if trainer.global_step != WARM:
            return
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts afresh


def main(arguments: list[str]) -> None:
    """Measures and prints."""
    quieten()
    recipe = arguments or ["--config", str(QUICKSTART)]
    short = ["--trainer.max_steps", str(STEPS), "--trainer.limit_val_batches", "0", "--trainer.logger", "false"]
    cli = RecipeCLI(
        [*recipe, *short, "--trainer.enable_checkpointing", "false", "--trainer.callbacks", "[]"], run=False
    )
    module, data, callback = cli.model, cli.datamodule, collapse_of(cli)
    if callback.schedule is not None:
        callback.schedule = Evenly(callback.schedule.target(module.begun.depth))
    found = forecast(module, callback, cli.trainer, Batches(data.batch_size, data.block_size))
    data.setup("fit")
    cli.trainer.callbacks.append(Peak())
    before = resident("VmRSS")
    cli.trainer.fit(module, datamodule=data)
    cuda = cli.trainer.strategy.root_device.type == "cuda"
    measured = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
    result = {
        "ratio": round(found.peak.total / measured, 3),
        "estimated_gib": round(found.peak.total / 2**30, 3),
        "measured_gib": round(measured / 2**30, 3),
        "teacher": found.teacher,
        "layers": found.stages[-1].depth,
        "batch": [data.batch_size, data.block_size],
        "train": module.train_usually,
        "activations": module.activations,
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
