"""What `fit` does when training is done: it measures and exports the student, and says what became of it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerBase

from lcprune import models, weights
from lcprune.cli import tables
from lcprune.data.module import TextDataModule
from lcprune.delivery.export import export
from lcprune.delivery.figures import Figures, model_figures, throughput
from lcprune.delivery.runs import FIGURES
from lcprune.distillation import adapters, averaging, sharded
from lcprune.distillation.callbacks import measure
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.quantized import holds_packed
from lcprune.distillation.teacher import cast, stored_dtype
from lcprune.files import write_text


@dataclass(frozen=True)
class Delivery:
    """Where a student goes, and what goes with it."""

    out: Path
    """Its own folder."""
    run: Path
    """The run's, for the figures."""
    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    recipe: str
    """As it was resolved."""


def close(trainer: Trainer, module: DistillationModule, data: TextDataModule, delivery: Delivery) -> None:
    """Measures, exports and tells, after the trainer has torn down; all ranks."""
    assert module.teacher is not None, "nothing was trained"
    averaging.finish(trainer, module)
    if sharded.is_sharded(module.student):
        final = measure(trainer, module)
        module.gather(stored_dtype(module.teacher_config))
    else:  # bring the models back to where they were trained
        device = trainer.strategy.root_device
        module.to(device)
        module.teacher.model.to(device)
        adapters.fold(module.student)
        cast(module.student, stored_dtype(module.teacher_config))
        final = measure(trainer, module)
    if trainer.is_global_zero:
        _deliver(module, data, delivery, final)
    trainer.strategy.barrier()


def _deliver(module: DistillationModule, data: TextDataModule, delivery: Delivery, final: dict[str, float]) -> None:
    export(
        module.student,
        delivery.out,
        tokenizer=delivery.tokenizer,
        history=replace(module.history, teacher=models.public_name(module.teacher_name)),
        recipe=delivery.recipe,
        figures=final,
        license=models.license_of(module.teacher_name),
    )
    figures = _figures(module, data, delivery.out, final)
    write_text(delivery.run / FIGURES, json.dumps(figures.to_dict(), indent=2) + "\n")
    tables.closing(figures, delivery.out)


def _figures(module: DistillationModule, data: TextDataModule, out: Path, final: dict[str, float]) -> Figures:
    assert module.teacher is not None
    batch, teacher = next(iter(data.val_dataloader())), module.teacher.model
    return Figures(
        teacher=model_figures(teacher, weights.folder_of(module.teacher_name)),
        student=model_figures(module.student, out),
        # A teacher in 4 or 8 bit unpacks itself at every step: its speed is not the original's.
        speed={} if holds_packed(teacher) else throughput(teacher, out, batch),
        history=module.history,
        final=final,
    )
