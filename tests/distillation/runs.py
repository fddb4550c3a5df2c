"""Small runs of the real thing: a six-layer Llama in a folder, a text file, a trainer that only does what it must.

Shared by the tests of this room and by the two scripts that they start in processes of their own.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import PreTrainedModel

from lcprune import AtSteps, Boundary, DistillationModule, FixedPlan, Logits, ProgressiveCollapse, TextDataModule
from lcprune.distillation.optim import RewarmingCosine
from lcprune.merging.calibration import Batch
from lcprune.merging.operators import Drop, Operator
from lcprune.merging.planners import Planner
from tests import builders

STEPS = 12
SECOND_MERGE = 7
"""Optimizer step of the second merge of `two_merges`; the first is at 3."""

SGD = partial(torch.optim.SGD, lr=1e-1)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
COSINE = partial(RewarmingCosine, warmup_steps=2, rewarm_steps=2)


def write_text(folder: Path, words: int = 400) -> Path:
    """Words of a small made-up language, always the same."""
    chance = random.Random(0)
    vocabulary = ["".join(chance.choices("abcdeinorst", k=chance.randint(2, 7))) for _ in range(40)]
    path = folder / "text.txt"
    path.write_text(" ".join(chance.choices(vocabulary, k=words)), encoding="utf-8")
    return path


def save_teacher(folder: Path, *, dropout: float = 0.0, model: PreTrainedModel | None = None) -> Path:
    """A tiny model and its tokenizer; with dropout in its attention every step depends on the random state."""
    model = builders.tiny_llama() if model is None else model
    model.config.attention_dropout = dropout
    return builders.save_tiny(folder, model)


def data_for(teacher: Path, text: Path, **settings: object) -> TextDataModule:
    """Blocks of 16 characters, two in a batch."""
    small = {"block_size": 16, "batch_size": 2, "validation_blocks": 4, "calibration_blocks": 4}
    return TextDataModule(tokenizer=str(teacher), path=text, **small | settings)  # type: ignore[arg-type]


def student_of(teacher: Path, **settings: object) -> DistillationModule:
    """A module with all the moving parts: two levels, AdamW, a schedule that warms up again."""
    usual = {"objective": [Logits(), Boundary(0.5)], "optimizer": ADAMW, "lr_scheduler": COSINE}
    return DistillationModule(teacher=str(teacher), **usual | settings)  # type: ignore[arg-type]


def two_merges(*, planner: Planner | None = None, operator: Operator | None = None) -> ProgressiveCollapse:
    """Six layers: five after step 3, four after step 7."""
    planner = FixedPlan([[1, 2], [3, 4]]) if planner is None else planner
    return ProgressiveCollapse(
        AtSteps({3: 5, SECOND_MERGE: 4}), planner=planner, operator=Drop("last") if operator is None else operator
    )


def trainer_for(root: Path, *callbacks: Callback, **settings: object) -> Trainer:
    """One CPU process, nothing on the screen, twelve optimizer steps."""
    usual = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "max_epochs": -1,
        "limit_val_batches": 2,
        "check_val_every_n_epoch": 1000,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    return Trainer(default_root_dir=root, callbacks=list(callbacks), **usual | settings)  # type: ignore[arg-type]


def checkpoints_in(folder: Path, every: int = 1) -> ModelCheckpoint:
    """Writes `last.ckpt` every so many optimizer steps, and nothing else."""
    return ModelCheckpoint(
        folder, save_last=True, save_top_k=0, every_n_train_steps=every, enable_version_counter=False
    )


class Losses(Callback):
    """The loss of every batch, by number; a resumed run overwrites what it repeats."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: Mapping[str, torch.Tensor],
        batch: Batch,
        index: int,
    ) -> None:
        """Takes down one loss."""
        self.seen[trainer.global_step] = outputs["loss"].item()


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter, by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same bit for bit."""
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def batch_of(rows: Iterable[Iterable[int]]) -> dict[str, torch.Tensor]:
    """A batch whose labels are its inputs."""
    input_ids = torch.tensor([list(row) for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


POINTS = ("before", "at", "after")
"""Where a run can be interrupted at a step's merge: before its batch; between optimizer step and merge; behind both."""


class Interrupt(Callback):
    """Calls `stop` at one point of one optimizer step. Stands before ProgressiveCollapse."""

    def __init__(self, step: int, point: str, stop: Callable[[], None]) -> None:
        self.step, self.point, self.stop = step, point, stop

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        """Before the batch of the step, or of the one behind it."""
        done = {"before": self.step - 1, "after": self.step}
        if trainer.global_step == done.get(self.point):
            self.stop()

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Right after the optimizer step."""
        if (trainer.global_step, self.point) == (self.step, "at"):
            self.stop()


def resumable(
    folder: Path, teacher: Path, text: Path, *others: Callback, resume: bool = False, **settings: object
) -> tuple[DistillationModule, dict[int, float]]:
    """A run with two merges that keeps `last.ckpt` in a folder, begun or gone on with; its losses by step."""
    losses, module = Losses(), student_of(teacher)
    torch.manual_seed(123 if resume else 0)
    trainer = trainer_for(folder, losses, *others, two_merges(), checkpoints_in(folder), **settings)
    checkpoint = str(folder / "last.ckpt") if resume else None
    trainer.fit(module, datamodule=data_for(teacher, text, validation_blocks=1), ckpt_path=checkpoint)
    return module, losses.seen
