"""What `fit` does when training is done: it measures and exports the student, and says what became of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lcprune import demo, weights
from lcprune.cli import tables
from lcprune.delivery.export import export
from lcprune.delivery.figures import Figures, model_figures, throughput
from lcprune.delivery.runs import FIGURES
from lcprune.distillation import adapters, averaging, sharded
from lcprune.distillation.callbacks import measure
from lcprune.distillation.quantized import holds_packed
from lcprune.distillation.teacher import cast, stored_dtype
from lcprune.files import write_text

if TYPE_CHECKING:
    from lcprune.cli.training import RecipeCLI


def close(cli: "RecipeCLI") -> None:
    """Measures, exports and tells, after the trainer has torn down; all ranks."""
    module, trainer = cli.model, cli.trainer
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
    folder = cli.run_folder  # asks all ranks
    if trainer.is_global_zero:
        _deliver(cli, final, folder)
    trainer.strategy.barrier()


def _deliver(cli: "RecipeCLI", final: dict[str, float], folder: Path) -> None:
    module, out = cli.model, cli.export_to
    assert out is not None
    export(
        module.student,
        out,
        tokenizer=cli.tokenizer,
        history=replace(module.history, teacher=demo.public_name(module.teacher_name)),
        recipe=cli.recipe_text,
        figures=final,
        license=demo.license_of(module.teacher_name),
    )
    figures = _figures(cli, final, out)
    write_text(folder / FIGURES, json.dumps(figures.to_dict(), indent=2) + "\n")
    tables.closing(figures, out)


def _figures(cli: "RecipeCLI", final: dict[str, float], out: Path) -> Figures:
    module = cli.model
    batch = next(iter(cli.datamodule.val_dataloader()))
    teacher = module.teacher.model
    return Figures(
        teacher=model_figures(teacher, weights.folder_of(module.teacher_name)),
        student=model_figures(module.student, out),
        # A teacher in 4 or 8 bit unpacks itself at every step: its speed is not the original's.
        speed={} if holds_packed(teacher) else throughput(teacher, out, batch),
        history=module.history,
        final=final,
    )
