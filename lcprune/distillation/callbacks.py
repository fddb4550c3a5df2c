"""ProgressiveCollapse: the student becomes shorter while Lightning trains it.

    schedule   at which optimizer step, down to which depth          (a pure function: nothing to remember)
    planner    which layers                                          (on rank 0, broadcast, compared by hash)
    operator   how their weights become one layer's

A merge happens right after an optimizer step, in `on_train_batch_end`: checkpoints are written after every other
callback, so the checkpoint of that step contains it, and a run that resumes does not repeat it. The callback keeps
no state; the history is the module's.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from math import inf
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lcprune.distillation import adapters, beforehand, guests, optim
from lcprune.distillation.beginning import Reference
from lcprune.distillation.guests import Guest, Shortened
from lcprune.distillation.metrics import HeldOut
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.schedules import Milestone, Schedule
from lcprune.distillation.strategies import optimizer_steps, parameters_changed
from lcprune.errors import InputError, RunError
from lcprune.merging import surgery
from lcprune.merging.activity import Activity
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.collapse import with_refit
from lcprune.merging.lineage import Lineage, MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, from_spec
from lcprune.merging.planners import OneShotRanking, Planner
from lcprune.merging.refit import Refit, repair
from lcprune.merging.remeasure import measure_activity
from lcprune.merging.streams import Stream, regrouped

REFUSED = {
    "BatchSizeFinder",
    "LearningRateFinder",
    "ModelPruning",
    "StochasticWeightAveraging",
    "WeightAveraging",
}
"""Lightning's callbacks that keep or restore weights of the old depth; by name, some came after lightning 2.5."""


@runtime_checkable
class CalibrationSource(Protocol):
    """A data module that can hand out text to plan merges by."""

    def calibration_batches(self) -> Sequence[Batch]:
        """Batches of training text, the same at every call."""


class ProgressiveCollapse(Callback):
    """Merges layers of the student during training.

    Args:
        schedule: At which optimizer steps the student gets down to which depth; null = no merges.
        planner: Which layers merge; default: OneShotRanking by BlockInfluence.
        operator: What becomes of their weights; default: Drop.
        refit: How the merged student is repaired before training goes on; null = not at all.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        planner: Planner | None = None,
        operator: Operator | None = None,
        refit: Refit | None = None,
    ) -> None:
        self.schedule = schedule
        self.planner = planner if planner is not None else OneShotRanking()
        self.operator = operator if operator is not None else Drop()
        self.refit = refit
        self._step_before = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses, before any weight is loaded, what could not end well."""
        others = [other for other in trainer.callbacks if isinstance(other, ProgressiveCollapse)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise InputError("trainer.callbacks holds ProgressiveCollapse beside the recipe's `collapse`: keep one.")
        guests.welcome(pl_module)
        if stage != "fit" or self.schedule is None:
            return
        if not guests.model_comes_later(pl_module):
            self.check(trainer, _ours(pl_module))
        if not isinstance(trainer.datamodule, CalibrationSource):  # type: ignore[attr-defined]
            raise InputError(
                "ProgressiveCollapse needs text to plan by: give the trainer a data module with a method "
                "calibration_batches(), like lcprune.TextDataModule."
            )

    def check(self, trainer: Trainer, module: Shortened) -> None:
        """Raises InputError for what can be known before text is read or a folder made."""
        beforehand.check_strategy(trainer.strategy, module.phases, module.train_usually)
        depth = module.begun.depth
        first_merge = inf if self.schedule is None else self.schedule.milestones(depth)[0][0]
        beforehand.check_trains(module.phases, module.train_usually, module.begun.lineage, first_merge)
        if self.schedule is None:
            return
        module.check_optimizer()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.schedule.check(depth, trainer.max_steps)
        for _, target in self.schedule.milestones(depth):
            after = self.planner.foresee(module.begun.lineage, target) if module.begun.steps else None
            if after is None:
                self.planner.check(depth, target)
            elif len(after) > target:
                raise InputError(
                    f"{self.planner} leaves {len(after)} of the {depth} layers of model.student, the schedule asks for "
                    f"{target}: name more groups or raise the target depth."
                )
        self.operator.check(layout_of(module.teacher_config))
        if self.refit is not None:
            self.refit.check(layout_of(module.teacher_config))
        if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise InputError(
                f"trainer.strategy={type(trainer.strategy).__name__} cannot merge layers during training: "
                "use a single device or ddp, or shorten the model first with `lcprune collapse`."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not REFUSED.isdisjoint(base.__name__ for base in type(callback).__mro__):
                raise InputError(
                    f"trainer.callbacks: {type(callback).__name__} holds on to weights that a merge takes away: "
                    "remove it, or train it after the last merge in a run of its own."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merges that are due at the step a run starts or resumes at; refuses those that the epochs end before.

        A checkpoint may stem from between an optimizer step and its merge (an exception, a signal of the cluster).
        """
        module, steps = _ours(pl_module), optimizer_steps(trainer)
        if isinstance(module, Guest):
            self.check(trainer, module)
            module.continue_randomness()
        last = 0 if self.schedule is None else self.schedule.milestones(module.begun.depth)[-1][0]
        if self.schedule is not None and steps <= last and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError(
                f"{self.schedule}: the merge at step {last} is never reached, the run ends after {steps} optimizer "
                "steps: merge earlier, or raise trainer.max_epochs or trainer.limit_train_batches."
            )
        if module.phases_begin == "merge":
            beforehand.warn_of_phases(module.phases, last, steps)
        if self.schedule is None:
            return
        for optimizer in trainer.optimizers:
            optim.check(optimizer)
        missed = [
            f"{depth} layers at step {step}"
            for step, depth in self.schedule.milestones(module.begun.depth)
            if step < trainer.global_step and depth < module.history.depth
        ]
        if missed:
            rank_zero_warn(
                f"collapse.schedule: {', '.join(missed)} lie before step {trainer.global_step}, where this run "
                "resumes, and are not made up for"
            )
        self._check_cache(trainer.global_step, module)
        self._merge_if_due(trainer, module)
        self._look_ahead(trainer, module)

    def _check_cache(self, step: int, module: Shortened) -> None:
        """Refuses a teacher cache that a later merge would find wanting; the module looks at the present lineage."""
        lineages = self.foresee(module, step)
        if lineages is not None or any(at > step for at, _ in self._ahead(module, step)):
            module.check_cache(lineages)

    def foresee(self, module: Shortened, step: int = 0) -> list[Lineage] | None:
        """Every lineage that is trained from an optimizer step on; None where only planning will tell.

        Args:
            module: With the student as it stands.
            step: Optimizer steps done; a merge that is due now is still to come.
        """
        ahead = self._ahead(module, step)
        lineage = module.history.lineage
        lineages = [] if ahead and ahead[0][0] == step else [lineage]
        for _, depth in ahead:
            after = self.planner.foresee(lineage, depth)
            if after is None:
                return None
            lineages.append(lineage := after)
        return lineages

    def _ahead(self, module: Shortened, step: int) -> list[Milestone]:
        milestones = () if self.schedule is None else self.schedule.milestones(module.begun.depth)
        return [(at, depth) for at, depth in milestones if at >= step and depth < module.history.depth]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Remembers, for the length of the batch, how many optimizer steps were done before it."""
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Merges when this batch has completed an optimizer step and the schedule says so."""
        if trainer.global_step != self._step_before:
            self._merge_if_due(trainer, _ours(pl_module))
            self._look_ahead(trainer, _ours(pl_module))

    def _look_ahead(self, trainer: Trainer, module: Shortened) -> None:
        """Tells the module when the next merge comes, which ends its phases."""
        ahead = (at for at, _ in self._ahead(module, trainer.global_step + 1))
        module.next_merge = next(ahead, None)

    def _merge_if_due(self, trainer: Trainer, module: Shortened) -> None:
        if self.schedule is None:
            return
        target = self.schedule.due(trainer.global_step, module.begun.depth)
        done = any(step.global_step == trainer.global_step for step in module.history.steps)
        if target is None or target >= module.history.depth or done:
            return
        steps = self._agreed_plan(trainer, module, target)
        if not steps:
            rank_zero_info(f"step {trainer.global_step}: {self.planner} found nothing to merge")
            return
        merge(trainer, module, steps)

    def _agreed_plan(self, trainer: Trainer, module: Shortened, target: int) -> tuple[MergeStep, ...]:
        """Rank 0's plan, on every rank; a mistake that it finds is raised on every rank too."""
        plan: MergeHistory | InputError | None = None
        if trainer.is_global_zero:
            try:
                plan = MergeHistory(module.history.depth, self._plan(trainer, module, target))
            except InputError as error:
                plan = error
        plan = trainer.strategy.broadcast(plan, 0)
        if isinstance(plan, InputError):
            raise plan
        assert plan is not None
        _compare(trainer, plan.digest)
        return plan.steps

    def _plan(self, trainer: Trainer, module: Shortened, target: int) -> tuple[MergeStep, ...]:
        source = trainer.datamodule  # type: ignore[attr-defined]
        calibration = Calibration(
            module.student, source.calibration_batches(), original=module.original, history=module.history
        )
        with _planning(trainer), adapters.plain(module.student):
            steps = with_refit(self.planner.plan(calibration, self.operator, target), self.refit)
        return tuple(replace(step, global_step=trainer.global_step) for step in steps)


def merge(trainer: Trainer, module: Shortened, steps: Sequence[MergeStep]) -> None:
    """Executes steps on a student in training and brings everything along that knew the layers."""
    batches = trainer.datamodule.calibration_batches() if _needs_text(steps) else ()  # type: ignore[attr-defined]

    def activity(wanted: Sequence[int]) -> Sequence[Activity]:
        with _planning(trainer):
            return measure_activity(module.student, batches, wanted)

    reference = module.reference() if steps[-1].refit is not None else None
    with adapters.plain(module.student) as adapted:
        for step in steps:
            outcome = surgery.apply(module.student, step, activity)
            if batches:
                _share(outcome.merged)
            for optimizer in trainer.optimizers:
                optim.carry_over(optimizer, outcome)
            module.history = module.history.append(step)
        if reference is not None:
            _repair(trainer, module, batches, reference, steps)
    for optimizer in trainer.optimizers:
        optim.carry_over(optimizer, adapted.outcome)
    optim.forget_gradients(list(module.student.parameters()))
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, optim.Rewarming):
            config.scheduler.rewarm()
    _forget_best(trainer)
    module.choose_trained()
    parameters_changed(trainer.strategy)
    _note_measurement(trainer, module)


def _needs_text(steps: Sequence[MergeStep]) -> bool:
    return any(step.refit is not None or from_spec(step.operator).needs_activity for step in steps)


def _repair(
    trainer: Trainer, module: Shortened, batches: Sequence[Batch], reference: Reference, steps: Sequence[MergeStep]
) -> None:
    """Refits the merged student; the optimizer's state of layers that did not merge stays."""
    text, before = regrouped(batches), reference.history
    with _planning(trainer):
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


def _note_measurement(trainer: Trainer, module: Shortened) -> None:
    """Writes what the merge did to the student into the last step of the history, and into the log."""
    figures = measure(trainer, module) if isinstance(module, DistillationModule) else {}
    last = module.history.steps[-1]
    steps = (*module.history.steps[:-1], replace(last, measured=figures))
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


def _ours(module: LightningModule) -> Shortened:
    return module if isinstance(module, DistillationModule) else Guest(module)


@contextmanager
def _planning(trainer: Trainer) -> Iterator[None]:
    """The run's precision, without autocast's cache of cast weights: trials change weights under the same Parameter."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with trainer.precision_plugin.forward_context():
            torch.set_autocast_cache_enabled(False)
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _compare(trainer: Trainer, digest: str) -> None:
    """Every rank must be about to execute the same plan, or their weights would part without a word."""
    mine = torch.tensor(int(digest[:15], 16), dtype=torch.int64, device=trainer.strategy.root_device)
    everyone = trainer.strategy.all_gather(mine).flatten()  # type: ignore[union-attr]
    if not bool((everyone == mine).all()):
        raise RunError("The ranks received different plans for a merge.")


def _forget_best(trainer: Trainer) -> None:
    """The best score and the patience so far belong to a deeper student."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            callback.best_model_score, callback.best_model_path = None, ""
            callback.kth_best_model_path = ""
            callback.best_k_models = {}
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(torch.inf if callback.monitor_op == torch.lt else -torch.inf)
