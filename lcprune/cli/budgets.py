"""How short, in the user's own terms: what `collapse` is asked for, and what it says in the end."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from lcprune import weights
from lcprune.amounts import count, size
from lcprune.cli import options
from lcprune.cli.options import Option
from lcprune.cli.training import RecipeCLI, collapse_of
from lcprune.distillation.callbacks import ProgressiveCollapse
from lcprune.distillation.teacher import cast, stored_dtype
from lcprune.errors import InputError
from lcprune.merging import collapse, surgery
from lcprune.merging.budget import Budget, Depth, PerplexityRatio, on_meta, one_of
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.planners import Planner
from lcprune.merging.within import MEASURED, ORIGINAL


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, give one above 1 such as 1.3") from None


def _layers(text: str) -> int | str:
    if text.rstrip().endswith("%"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of layers such as 24, nor a share of them such as 75%"
        ) from None


OPTIONS: tuple[Option, ...] = (
    (
        "--target-depth",
        _layers,
        "Number of layers to keep, or a share of them such as 75%%, to the nearest whole one; default, if no target is "
        "given: where the recipe's schedule ends.",
    ),
    (
        "--target-params",
        str,
        "Number of parameters to keep at most, such as 100M (K, M, B or T); a tied head counts once.",
    ),
    (
        "--target-size",
        str,
        "Size of the weights on disk at most, such as 200MB or 190MiB, in the dtype that the original has there.",
    ),
    (
        "--max-perplexity-ratio",
        _ratio,
        "Become as short as this multiple of the original's perplexity on the calibration text allows, such as 1.3; "
        "plans are tried out, which takes longer.",
    ),
)
"""One of them at most."""
EXAMPLES = """how short, an example of each:
  lcprune collapse --config recipes/best.yaml --target-depth 24 --out short
  lcprune collapse --config recipes/best.yaml --target-depth 75% --out short
  lcprune collapse --config recipes/best.yaml --target-params 100M --out short
  lcprune collapse --config recipes/best.yaml --target-size 400MB --out short
  lcprune collapse --config recipes/best.yaml --max-perplexity-ratio 1.3 --out short
"""


@dataclass(frozen=True)
class Goal:
    """A budget that this recipe can keep to with this model, as far as shapes tell."""

    budget: Budget
    """What was asked for."""
    depth: int | None
    """How many layers that is; None where only measuring tells."""

    @property
    def max_perplexity_ratio(self) -> float | None:
        """What measuring must keep to, if that is the budget."""
        return self.budget.max_perplexity_ratio if isinstance(self.budget, PerplexityRatio) else None

    def check_reached(self, planner: Planner, plan: MergeHistory) -> None:
        """Raises InputError if the planner has stopped above the budget, or before it has merged anything."""
        if self.depth is not None:
            self.budget.check_reached(planner, plan.depth, self.depth)
        if not plan.steps:
            raise InputError(
                f"{planner} merges nothing here, and the model itself is no student: loosen what it keeps to (of "
                "ThresholdPlanner, lower threshold or layers_per_merge), or choose a planner that goes on to any depth "
                "(OneShotRanking, GreedyPlanner)."
            )


def asked(own: argparse.Namespace) -> Budget | None:
    """The budget that the options name; None if they name none.

    Raises:
        InputError: There are several, its value means nothing, or another option leaves it no meaning.
    """
    budget = one_of(
        target_depth=own.target_depth,
        target_params=own.target_params,
        target_size=own.target_size,
        max_perplexity_ratio=own.max_perplexity_ratio,
    )
    if budget is None:
        return None
    if own.plan is not None:
        option = next(name for name, *_ in OPTIONS if getattr(own, name.strip("-").replace("-", "_")) is not None)
        raise InputError(f"--plan says what merges already, {option} means nothing beside it: give one of them.")
    if own.stream and isinstance(budget, PerplexityRatio):
        raise InputError(
            "--max-perplexity-ratio tries merged models out, which a model read layer by layer cannot be: give "
            "--target-depth, --target-params or --target-size, or leave --stream out."
        )
    return budget


def goal(budget: Budget | None, cli: RecipeCLI) -> Goal:
    """What to plan for; the weights are not needed.

    Args:
        budget: As asked for; None = where the recipe's schedule ends.
        cli: The recipe.

    Raises:
        InputError: The model cannot become so short, or planner, operator or refit do not fit it.
    """
    callback, depth = collapse_of(cli), options.depth_of_teacher(cli)
    if budget is None:
        budget = Depth(_end_of_schedule(callback, depth))
    if isinstance(budget, Depth):
        _check_target_depth(budget.target_depth, depth)
    if callback.stages:
        raise InputError(
            "collapse.stages are for fit, which merges several times; without training one planner, operator and refit "
            "do it all: leave them out (--collapse.stages null)."
        )
    model = as_stored(cli.model.teacher_config)
    collapse.check(model, budget, callback.planner, callback.operator, callback.refit)
    return Goal(budget, budget.depth(model))


def outcome(history: MergeHistory, cli: RecipeCLI, budget: Budget | None = None, folder: Path | None = None) -> str:
    """What the student amounts to.

    Args:
        history: How it comes from the teacher.
        cli: The recipe.
        budget: What was asked for.
        folder: Where it has been written, if it has been; without it, its size is that of its tensors.
    """
    model = as_stored(cli.model.teacher_config)
    before = _parameters(model), _bytes(model)
    surgery.replay(model, history)
    after = _parameters(model), weights.size_of(folder) if folder is not None else _bytes(model)
    parameters = f"{count(after[0])} of {count(before[0])} parameters"
    sizes = f"{size(after[1])} of {size(before[1])}"
    text = f"{history.depth} of {history.teacher_depth} layers, {parameters}, {sizes}"
    # A plan from a file may have been edited since it was measured.
    measured = history.steps[-1].measured if history.steps and isinstance(budget, PerplexityRatio) else {}
    if MEASURED in measured:
        found, original = measured[MEASURED], measured[ORIGINAL]
        text += f"\ncalibration perplexity {original:.4g} -> {found:.4g}, {found / original:.4g} times the original's"
    return text


def _end_of_schedule(callback: ProgressiveCollapse, depth: int) -> int:
    if callback.schedule is None:
        options = ", ".join(name for name, *_ in OPTIONS)
        raise InputError(f"How short? The recipe has no collapse.schedule: give it one, or one of {options}.")
    return callback.schedule.target(depth)


def _check_target_depth(target: int | str, depth: int) -> None:
    try:
        collapse.check_target_depth(target, depth)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}: give another --target-depth.") from error


def as_stored(config: PretrainedConfig) -> PreTrainedModel:
    """The original without its weights, in the dtype that the student will be stored in."""
    model = on_meta(config)
    cast(model, stored_dtype(config))
    return model


def _parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
