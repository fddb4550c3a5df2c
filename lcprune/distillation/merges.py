"""One merge of a student in training, and all that has to follow it.

    measure, merge, refit       the student                    and back again, if it has cost too much
    bring along                 optimizers, averages, learning rates, callbacks, strategy
    measure                     what the history and the log say about it

Everything that follows is brought along only once the merge is kept.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from lcprune.distillation import adapters, averaging, companions, optim, sharded
from lcprune.distillation.beforehand import calibration_text
from lcprune.distillation.beginning import Reference
from lcprune.distillation.guests import Shortened
from lcprune.distillation.metrics import HeldOut
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.standing import BEFORE, JUDGE
from lcprune.distillation.strategies import parameters_changed
from lcprune.distillation.undo import Undo
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.activity import Activity
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.lineage import MergeStep
from lcprune.merging.operators import from_spec
from lcprune.merging.refit import repair
from lcprune.merging.remeasure import measure_activity
from lcprune.merging.streams import Stream, regrouped
from lcprune.merging.surgery import Outcome
from lcprune.merging.within import calibration_perplexity


def merge(
    trainer: Trainer,
    module: Shortened,
    steps: Sequence[MergeStep],
    max_jump: float | None = None,
    by_validation: bool = False,
) -> None:
    """Executes steps on a student in training and brings everything along that knew the layers.

    Args:
        trainer: Of the run.
        module: Whose student merges.
        steps: What merges.
        max_jump: By what they may multiply the calibration perplexity, or they are undone; None = by anything.
        by_validation: Whether recovery will be judged by the validation perplexity before the merge.
    """
    wanted = max_jump is not None or _needs_text(steps)
    batches = calibration_text(trainer.datamodule) if wanted else ()  # type: ignore[attr-defined]
    before = shown(trainer, module) if by_validation and isinstance(module, DistillationModule) else {}
    with sharded.whole(module.student) as shards, adapters.plain(module.student) as adapted:
        undo = None if max_jump is None else Undo(module, lambda: _perplexity(trainer, module, batches), max_jump)
        executed = _execute(trainer, module, steps, batches)
        undone = undo is not None and undo.if_too_much()
    if undone:
        module.standing.refused += (trainer.global_step,)
        rank_zero_info(f"step {trainer.global_step}: a merge to {executed.depth} layers is undone, {undo}")
        return
    outcomes = [shards.of(outcome) for outcome in (*executed.outcomes, adapted.outcome)]
    _bring_along(trainer, module, executed, outcomes)
    figures = {} if undo is None else undo.figures
    _note_measurement(trainer, module, figures | ({BEFORE: before[JUDGE]} if JUDGE in before else {}))


@dataclass(frozen=True)
class _Executed:
    """What a merge did to the student."""

    depth: int
    outcomes: list[Outcome]
    chosen: list[Sequence[torch.Tensor]]
    added: dict[str, torch.Tensor]


def _execute(trainer: Trainer, module: Shortened, steps: Sequence[MergeStep], batches: Sequence[Batch]) -> _Executed:
    """Merges and refits the student; the history says so, nobody else knows yet."""
    reference = module.reference() if steps[-1].refit is not None else None
    outcomes, chosen = list[Outcome](), list[Sequence[torch.Tensor]]()

    def activity(wanted: Sequence[int]) -> Sequence[Activity]:
        with planning(trainer):
            return measure_activity(module.student, batches, wanted)

    for step in steps:
        outcomes.append(surgery.apply(module.student, step, activity))
        if batches:
            _share(outcomes[-1].merged)
        chooses = from_spec(step.operator).needs_activity
        chosen.append([parameter.data for parameter in outcomes[-1].merged] if chooses else ())
        module.history = module.history.append(step)
    added = {}
    if reference is not None:
        averaged = bool(averaging.copies(trainer))  # else nothing should keep the weights before the refit
        merged = {name: parameter.data for name, parameter in module.student.named_parameters() if averaged}
        _repair(trainer, module, batches, reference, steps)
        if averaged:
            added = averaging.added(merged, module.student)
    return _Executed(module.history.depth, outcomes, chosen, added)


def _bring_along(trainer: Trainer, module: Shortened, executed: _Executed, outcomes: Sequence[Outcome]) -> None:
    """Optimizers, averages, learning rates, callbacks and strategy follow a merge that is kept."""
    steps = module.history.steps[-len(executed.outcomes) :]
    for copy in averaging.copies(trainer):
        averaging.follow(copy.student, steps, executed.chosen, executed.added)
    for optimizer in trainer.optimizers:
        for outcome in outcomes:
            optim.carry_over(optimizer, outcome)
    optim.forget_gradients(list(module.student.parameters()))
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, optim.Rewarming):
            config.scheduler.rewarm()
    companions.forget_best(trainer)
    module.choose_trained()
    parameters_changed(trainer.strategy)


def _needs_text(steps: Sequence[MergeStep]) -> bool:
    return any(step.refit is not None or from_spec(step.operator).needs_activity for step in steps)


def _repair(
    trainer: Trainer, module: Shortened, batches: Sequence[Batch], reference: Reference, steps: Sequence[MergeStep]
) -> None:
    """Refits the merged student; the optimizer's state of layers that did not merge stays."""
    text, before = regrouped(batches, module.student), reference.history
    with planning(trainer):
        repair(Stream(module.student, text), Stream(reference.model, text), before.extend(steps), before)
    _share(module.student.parameters())


def _share(merged: Iterable[torch.nn.Parameter]) -> None:
    """Every rank measures for itself, and may choose otherwise between near equals: rank 0's weights count."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for parameter in merged:
            torch.distributed.broadcast(parameter.data, 0)


def measure(trainer: Trainer, module: DistillationModule) -> dict[str, float]:
    """Validation perplexity and agreement as they are now, over the batches the validation loop would take."""
    source, limit = trainer.datamodule, trainer.limit_val_batches  # type: ignore[attr-defined]
    if limit == 0 or not is_overridden("val_dataloader", source):
        return {}
    loader = source.val_dataloader()
    if isinstance(loader, list | tuple | dict):
        raise InputError(
            f"val_dataloader() of {type(source).__name__} returns a {type(loader).__name__}, and an "
            "lcprune.DistillationModule validates on one loader: return that."
        )
    if limit == 1.0 and isinstance(limit, float):
        count = None  # a stream has no length
    else:
        count = int(len(loader) * limit) if isinstance(limit, float) else limit
        if count == 0:
            return {}
    metric = HeldOut().to(module.device)
    training = module.student.training
    module.student.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in islice(loader, count):
            module.observe({name: tensor.to(module.device) for name, tensor in batch.items()}, metric)
    module.student.train(training)
    return {f"val/{name}": value.item() for name, value in metric.compute().items()}


def shown(trainer: Trainer, module: DistillationModule) -> dict[str, float]:
    """As `measure`, of what validation shows: averaged weights where there are any; the same on every rank."""
    with averaging.shown(trainer, module):
        figures = measure(trainer, module)
    return trainer.strategy.broadcast(figures, 0)


def _perplexity(trainer: Trainer, module: Shortened, batches: Sequence[Batch]) -> float:
    """On the calibration text; rank 0's counts."""
    with planning(trainer):
        return trainer.strategy.broadcast(calibration_perplexity(Calibration(module.student, batches)), 0)


def _note_measurement(trainer: Trainer, module: Shortened, others: Mapping[str, float]) -> None:
    """Writes what the merge did to the student into the last step of the history, and into the log."""
    figures = shown(trainer, module) if isinstance(module, DistillationModule) else {}
    last = module.history.steps[-1]
    steps = (*module.history.steps[:-1], replace(last, measured={**others, **figures}))
    module.history = replace(module.history, steps=steps)
    # ModelCheckpoint runs next and judges by the last figures known: let them be this student's.
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
    after = {f"{name}_after_merge": value for name, value in figures.items()}
    for logger in trainer.loggers:
        logger.log_metrics({**after, "depth": float(module.history.depth)}, step=trainer.global_step)
    rank_zero_info(
        f"step {trainer.global_step}: merged to {module.history.depth} layers"
        + (f", validation perplexity {figures['val/perplexity']:.2f}" if figures else "")
    )


@contextmanager
def planning(trainer: Trainer) -> Iterator[None]:
    """The run's precision, without autocast's cache of cast weights: trials change weights under the same Parameter."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with trainer.precision_plugin.forward_context():
            torch.set_autocast_cache_enabled(False)
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
