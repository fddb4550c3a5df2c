"""ProgressiveCollapse: the student becomes shorter while Lightning trains it.

    schedule   when, down to which depth                             (a pure function: nothing to remember)
    planner    which layers                                          (on rank 0, broadcast, compared by hash)
    operator   how their weights become one layer's
    limit      how much one merge may cost, or it is undone

A merge happens right after an optimizer step, in `on_train_batch_end`: checkpoints are written after every other
callback, so the checkpoint of that step contains it, and a run that resumes does not repeat it. The callback
saves no state: history and standing are the module's, and of the run it remembers only the step it looked at last.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lcprune.distillation import adapters, averaging, beforehand, companions, guests, optim, sharded, stages
from lcprune.distillation.beforehand import CalibrationSource, calibration_text
from lcprune.distillation.guests import Guest, Shortened
from lcprune.distillation.merges import measure as measure
from lcprune.distillation.merges import merge, planning, shown
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.schedules import Deadline, Facts, Schedule, last_known
from lcprune.distillation.stages import Method, Stage, check_order
from lcprune.distillation.standing import JUDGE, Standing
from lcprune.distillation.strategies import check_merges, is_over, is_sharding, optimizer_steps, validation_follows
from lcprune.distillation.triggers import ByTokens, WhenRecovered  # noqa: F401 - short names in recipes
from lcprune.errors import InputError, RunError
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.checks import check_kind
from lcprune.merging.collapse import check_target, remember, with_refit
from lcprune.merging.lineage import Lineage, MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator
from lcprune.merging.planners import OneShotRanking, Planner
from lcprune.merging.refit import Refit


class ProgressiveCollapse(Callback):
    """Merges layers of the student during training.

    Args:
        schedule: At which points of the run the student reaches which depth; null = no merges.
        planner: Which layers merge; default: OneShotRanking by BlockInfluence.
        operator: How their weights become one layer's; default: Drop.
        refit: How the merged student is repaired before training goes on; null = not at all.
        stages: Other planners, operators and refits for parts of the way down; default: the same all the way.
        max_perplexity_jump: A merge that, refit included, multiplies the student's perplexity on the calibration text
            by more than this is undone, and tried again at the schedule's next merge; null = none is undone.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        planner: Planner | None = None,
        operator: Operator | None = None,
        refit: Refit | None = None,
        stages: list[Stage] | None = None,
        max_perplexity_jump: float | None = None,
    ) -> None:
        self.schedule = schedule
        self.planner = planner if planner is not None else OneShotRanking()
        self.operator = operator if operator is not None else Drop()
        self.refit = refit
        self.stages = tuple(stages or ())
        self._check_kinds()
        check_order(self.stages)
        self.max_perplexity_jump = max_perplexity_jump
        self._step_before = -1
        if max_perplexity_jump is not None and not 1 <= max_perplexity_jump < inf:
            raise InputError(
                f"collapse.max_perplexity_jump={max_perplexity_jump} must be a number of 1 or more, what one merge may "
                "multiply the perplexity by, such as 1.5."
            )

    def _check_kinds(self) -> None:
        if self.schedule is not None:
            check_kind("schedule", self.schedule, Schedule, "lcprune.Evenly(20)")
        check_kind("planner", self.planner, Planner, "lcprune.OneShotRanking()")
        check_kind("operator", self.operator, Operator, "lcprune.Drop()")
        if self.refit is not None:
            check_kind("refit", self.refit, Refit, "lcprune.RidgeRefit()")
        for stage in self.stages:
            check_kind("stages", stage, Stage, "lcprune.Stage(26)")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses, before any weight is loaded, what could not end well."""
        others = [other for other in trainer.callbacks if isinstance(other, ProgressiveCollapse)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise InputError("trainer.callbacks holds ProgressiveCollapse beside the recipe's `collapse`: keep one.")
        guests.welcome(pl_module)
        if stage == "fit" and isinstance(pl_module, DistillationModule):
            companions.check_always(trainer, pl_module)
        if stage != "fit" or self.schedule is None:
            return
        if not guests.model_comes_later(pl_module):
            self.check(trainer, _ours(pl_module))
        if not isinstance(trainer.datamodule, CalibrationSource):  # type: ignore[attr-defined]
            raise InputError(
                "ProgressiveCollapse needs text to plan by: give the trainer a data module with a method "
                "calibration_batches(), like lcprune.TextDataModule."
            )
        self.check_text(calibration_text(trainer.datamodule))  # type: ignore[attr-defined]
        if self.schedule.by_validation and not is_overridden("val_dataloader", trainer.datamodule):  # type: ignore[attr-defined]
            raise InputError(f"{self.schedule} looks at validations, and the data module has no val_dataloader().")

    def check(self, trainer: Trainer, module: Shortened) -> None:
        """Raises InputError for what can be known before text is read or a folder made."""
        beforehand.check_strategy(trainer.strategy, module.phases, module.train_usually)
        averaging.check(trainer, [phase.trained(module.train_usually) for phase in module.phases])
        if not isinstance(module, Guest):
            precision = str(trainer.precision)
            beforehand.check_precision(precision, module.weights_dtype, module.phases, module.train_usually)
        depth = module.begun.depth
        first_merge = inf if self.schedule is None else self.schedule.deadlines(depth)[0][0]
        beforehand.check_trains(module.phases, module.train_usually, module.begun.lineage, first_merge)
        if self.schedule is None:
            return
        if isinstance(module, Guest):
            self._check_guest(trainer, module)
        else:
            beforehand.check_merges(str(trainer.precision))
        module.check_optimizer()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.schedule.check(depth, trainer.max_steps)
        if self.schedule.by_validation and trainer.limit_val_batches == 0:
            raise InputError(
                f"{self.schedule} looks at validations, and trainer.limit_val_batches=0 allows none: raise it, or "
                "merge at steps that are known (Evenly)."
            )
        self._check_methods(module)
        check_merges(trainer.strategy)
        if self.max_perplexity_jump is not None and is_sharding(trainer.strategy):
            raise InputError(
                f"collapse.max_perplexity_jump={self.max_perplexity_jump} takes merges back, which has not been proved "
                "for a model in shards: set it to null, or use one device or ddp."
            )
        companions.check(trainer)

    def _check_guest(self, trainer: Trainer, module: Guest) -> None:
        """What only DistillationModule has all that it takes for."""
        whose = f"and this run trains a {type(module.module).__name__}"
        if self.schedule is not None and self.schedule.by_validation:
            raise InputError(
                f"{self.schedule} looks at validations of lcprune.DistillationModule, {whose}: merge at steps or "
                "tokens that are known (Evenly, ByTokens)."
            )
        if is_sharding(trainer.strategy):
            raise InputError(
                f"trainer.strategy={type(trainer.strategy).__name__} merges layers of an lcprune.DistillationModule, "
                f"{whose}: use one device or ddp."
            )
        averaging.refuse(trainer, whose)

    def _check_methods(self, module: Shortened) -> None:
        """Planners, operators and refits against the model and the depths that are asked of them."""
        assert self.schedule is not None
        depth, layout = module.begun.depth, layout_of(module.teacher_config)
        depths = [target for _, target in self.schedule.milestones(depth)]
        stages.check(self.stages, depths)
        lineage, sure = module.begun.lineage, True
        for target in depths:
            method = self.method(target)
            after = method.planner.foresee(lineage, target) if self.stages or module.begun.steps else None
            if after is None:
                method.planner.check(depth, target)
                sure = False  # of what later stages begin with
            elif sure and len(after) > target:
                raise InputError(
                    f"{method.planner} leaves {len(after)} of the {depth} layers that the run begins with, the "
                    f"schedule asks for {target}: name more groups or raise the target depth."
                )
            lineage = after or lineage
            method.planner.check_family(layout)
            method.operator.check(layout)
            if method.refit is not None:
                method.refit.check(layout)

    def check_text(self, batches: Sequence[Batch]) -> None:
        """Raises InputError if there is not enough of it for every planner and refit."""
        parts = [self.planner, self.refit, *(part for stage in self.stages for part in (stage.planner, stage.refit))]
        for part in parts:
            if part is not None:
                part.check_text(batches)

    def method(self, target: int) -> Method:
        """Planner, operator and refit of a merge down to a depth."""
        return stages.method(self.stages, Method(self.planner, self.operator, self.refit), target)

    def check_target(self, done: MergeHistory, target: int) -> None:
        """Raises InputError if it is known that the planner does not get a student of this history down to a depth."""
        check_target(self.method(target).planner, done, target)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merges that are due at the step a run starts or resumes at; refuses those that the epochs end before.

        A checkpoint may stem from between an optimizer step and its merge (an exception, a signal of the cluster).
        """
        module, steps = _ours(pl_module), optimizer_steps(trainer)
        merged = any(step.global_step is not None for step in module.history.steps)
        anew = merged and trainer.global_step == 0 and not module.resumes
        if anew:
            module.begin_anew()
        if anew or isinstance(module, Guest):
            self.check(trainer, module)
        if isinstance(module, Guest):
            module.continue_randomness()
        last = 0 if self.schedule is None else last_known(self.schedule.deadlines(module.begun.depth))
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
        if trainer.global_step == 0:
            module.standing = Standing()
        facts = self._facts(trainer, module)
        if isinstance(self.schedule, ByTokens):
            self.schedule.check_counted(facts.step, facts.tokens)
        missed = self.schedule.missed(facts)
        if missed and not facts.refused:
            rank_zero_warn(
                f"collapse.schedule: {', '.join(missed)} lie before {self.schedule.unit} "
                f"{self.schedule.position(facts)}, where this run resumes, and are not made up for"
            )
        self._check_cache(trainer.global_step, module)
        self._merge_if_due(trainer, module)
        if module.standing.pending:  # the run was stopped between a checkpoint and the validation behind it
            assert isinstance(module, DistillationModule)
            module.standing.validated(shown(trainer, module)[JUDGE])
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
            after = self.method(depth).planner.foresee(lineage, depth)
            if after is None:
                return None
            lineages.append(lineage := after)
        return lineages

    def _ahead(self, module: Shortened, step: int) -> list[Deadline]:
        deadlines = () if self.schedule is None else self.schedule.deadlines(module.begun.depth)
        return [(at, depth) for at, depth in deadlines if at >= step and depth < module.history.depth]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Remembers, for the length of the batch, how many optimizer steps were done before it."""
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Merges when this batch has completed an optimizer step and the schedule says so."""
        module = _ours(pl_module)
        if isinstance(self.schedule, ByTokens) or isinstance(module, DistillationModule):  # others yield what they like
            module.standing.read(batch)
        if trainer.global_step != self._step_before:
            module.standing.stepped()
            self._merge_if_due(trainer, module)
            self._look_ahead(trainer, module)
            # What training_step logged is the depth before the merge; the file name of a checkpoint needs this one.
            pl_module.log("depth", float(module.history.depth), logger=False)
        module.standing.pending = self._counts_validations(module) and validation_follows(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes down what a schedule looks at."""
        value = trainer.callback_metrics.get(JUDGE)
        if trainer.state.fn != "fit" or trainer.sanity_checking or value is None:
            return
        module = _ours(pl_module)
        if self._counts_validations(module):
            module.standing.validated(trainer.strategy.broadcast(value.item(), 0))

    def _counts_validations(self, module: Shortened) -> bool:
        """Only in the last phase, which a run is for, is there anything to recover."""
        if self.schedule is None or not self.schedule.by_validation or isinstance(module, Guest):
            return False
        return module.now.phase is module.phases[-1]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so where the student has not become as short as the schedule wanted."""
        module = _ours(pl_module)
        remember(module.student, module.history)
        if self.schedule is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        depth, target = module.history.depth, self.schedule.target(module.begun.depth)
        if depth > target:
            refused = ", ".join(map(str, module.standing.refused))
            why = f"; the merges tried at step {refused} cost more than collapse.max_perplexity_jump" if refused else ""
            rank_zero_warn(f"collapse: the run ends with {depth} layers, its schedule with {target}{why}")

    def _look_ahead(self, trainer: Trainer, module: Shortened) -> None:
        """Tells the module when, at the latest, the next merge comes, which ends its phases."""
        ahead = (int(at) for at, _ in self._ahead(module, trainer.global_step + 1) if at < inf)
        module.next_merge = next(ahead, None)

    def _facts(self, trainer: Trainer, module: Shortened) -> Facts:
        """What the schedule looks at; where it goes by tokens, ranks meet and wait for their devices in here."""
        if isinstance(self.schedule, ByTokens):
            module.standing.tokens()
        return module.standing.facts(trainer.global_step, module.history, module.begun.depth)

    def _merge_if_due(self, trainer: Trainer, module: Shortened) -> None:
        step, standing = trainer.global_step, module.standing
        if self.schedule is None or standing.asked[0] == step:
            return
        facts = self._facts(trainer, module)
        target = self.schedule.due(facts)
        if target is not None and is_over(trainer):
            return  # nothing would be trained after it; a run that goes on from here begins with it
        if target is not None and not any(done.global_step == step for done in module.history.steps):
            steps = self.agreed_plan(trainer, module, target)
            if steps:
                with module.boundary.changing("A merge"):
                    merge(trainer, module, steps, self.max_perplexity_jump, self.schedule.by_validation)
                sharded.let_go(module.student)
            else:
                rank_zero_info(f"step {step}: {self.method(target).planner} found nothing to merge")
            standing.merged(step)
        else:
            standing.asked = (step, facts.tokens)
        if step == 1 and isinstance(self.schedule, ByTokens):
            last, _ = self.schedule.milestones(module.begun.depth)[-1]
            beforehand.warn_of_tokens(last, facts.tokens, optimizer_steps(trainer))

    def agreed_plan(self, trainer: Trainer, module: Shortened, target: int) -> tuple[MergeStep, ...]:
        """Rank 0's plan, on every rank; a mistake that it finds is raised on every rank too."""
        plan: MergeHistory | InputError | None = None
        # Of a sharded teacher every layer is gathered from all ranks: all of them plan, and rank 0 is right.
        if trainer.is_global_zero or is_sharding(trainer.strategy):
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
        text = calibration_text(trainer.datamodule)  # type: ignore[attr-defined]
        calibration = Calibration(module.student, text, original=module.original, history=module.history)
        method = self.method(target)
        with planning(trainer), sharded.whole(module.student), adapters.plain(module.student):
            steps = with_refit(method.planner.plan(calibration, method.operator, target), method.refit)
        return tuple(replace(step, global_step=trainer.global_step) for step in steps)


def _ours(module: LightningModule) -> Shortened:
    return module if isinstance(module, DistillationModule) else Guest(module)


def _compare(trainer: Trainer, digest: str) -> None:
    """Every rank must be about to execute the same plan, or their weights would part without a word."""
    mine = torch.tensor(int(digest[:15], 16), dtype=torch.int64, device=trainer.strategy.root_device)
    everyone = trainer.strategy.all_gather(mine).flatten()  # type: ignore[union-attr]
    if not bool((everyone == mine).all()):
        raise RunError("The ranks received different plans for a merge.")
