"""What can be known to fail before any weight is loaded, from the settings of a run alone."""

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lcprune.distillation.levels import Labels, Logits
from lcprune.distillation.phases import Phase
from lcprune.distillation.trained import Trained, trained_layers
from lcprune.errors import InputError
from lcprune.merging.lineage import Lineage


def try_out(make_optimizer: OptimizerCallable, make_scheduler: LRSchedulerCallable | None) -> Optimizer:
    """Makes optimizer and scheduler for a Parameter that nobody needs, so that their own mistakes show.

    Args:
        make_optimizer: From Parameters.
        make_scheduler: From the optimizer; None = there is none.

    Returns:
        The optimizer.

    Raises:
        InputError: If the scheduler is one that is not stepped by the number of optimizer steps.
    """
    optimizer = make_optimizer(iter([Parameter(torch.zeros(1))]))
    if make_scheduler is not None and isinstance(make_scheduler(optimizer), ReduceLROnPlateau):
        raise InputError(
            "model.lr_scheduler=ReduceLROnPlateau follows a figure, and schedulers are stepped after every optimizer "
            "step here: take RewarmingCosine, RewarmingWSD or one of torch's that follow the step."
        )
    return optimizer


def check_strategy(strategy: Strategy, phases: Sequence[Phase], usually: Trained) -> None:
    """Plain DDP waits for the gradient of every trained Parameter, and only a loss on the logits reaches all.

    Args:
        strategy: The trainer's; others than DDP do not wait.
        phases: Of the run.
        usually: What is trained where a phase does not say.

    Raises:
        InputError: If a phase would leave it waiting.
    """
    if not isinstance(strategy, DDPStrategy) or strategy._ddp_kwargs.get("find_unused_parameters"):
        return
    for phase in phases:
        on_head = any(isinstance(level, Logits | Labels) for level in phase.objective)
        if not on_head and phase.trained(usually) not in ("merged", "lora_merged"):
            raise InputError(
                f"model: objective {[type(level).__name__ for level in phase.objective]} reaches no layer behind the "
                "last merged one, for whose gradients trainer.strategy=ddp would wait: add Logits, set train: merged, "
                "or use strategy ddp_find_unused_parameters_true."
            )


def check_trains(phases: Sequence[Phase], usually: Trained, lineage: Lineage, first_merge: float) -> None:
    """Every phase before the first merge of a run has something to train.

    Args:
        phases: Of the run.
        usually: What is trained where a phase does not say.
        lineage: With which it begins.
        first_merge: Its optimizer step; infinite = there is none.

    Raises:
        InputError: If one has not.
    """
    step = 0
    for phase in phases:
        what = phase.trained(usually)
        if step < first_merge and not trained_layers(what, lineage):
            raise InputError(
                f"train={what} trains nothing before the first merge, from step {step} on: merge at step 0 "
                "(collapse.schedule.first: 0), or train all or layers until then."
            )
        step += phase.steps or 0


def warn_of_phases(phases: Sequence[Phase], begun: int, end: float) -> None:
    """Says so where the last phase, which a run is for, never begins.

    Args:
        phases: Of the run.
        begun: The optimizer step at which they begin for the last time.
        end: Optimizer steps of the run.
    """
    last = begun + sum(phase.steps or 0 for phase in phases[:-1])
    if len(phases) > 1 and last >= end:
        rank_zero_warn(
            f"phases: the last one begins at step {last}, and the run ends after {end:.0f}: it is never trained; "
            "shorten the phases before it, or train longer"
        )


def warn_of_tokens(last: int, read: int, steps: float) -> None:
    """Says, after the first optimizer step, where a merge by tokens is never reached.

    Args:
        last: Tokens at the last merge.
        read: Tokens of the first step.
        steps: Optimizer steps of the run.
    """
    if read * steps < last:
        rank_zero_warn(
            f"collapse.schedule: this run reads about {read * steps:.0f} tokens ({read} a step), and the last merge is "
            f"due at token {last}: merge earlier, or train longer"
        )
