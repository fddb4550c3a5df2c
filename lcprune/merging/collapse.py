"""A shorter model without any training: plan, then merge. What `lcprune collapse` and a notebook call.

history = collapse(model, batches, target_depth=24)          # model is changed in place
history = plan(model, batches, target_depth=24)              # nothing is touched
execute(model, history)                                      # ... until now, perhaps after editing it
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.operators import Drop, Operator, from_spec
from lcprune.merging.planners import OneShotRanking, Planner


def plan(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    target_depth: int,
    planner: Planner | None = None,
    operator: Operator | None = None,
) -> MergeHistory:
    """Plans how to shorten a model; leaves it as it is.

    Args:
        model: An unmerged causal LM of a known family.
        batches: Calibration batches, `input_ids` [B, T] each.
        target_depth: Number of layers wanted; a planner with a threshold of its own may stop before.
        planner: Which layers merge; default OneShotRanking by BlockInfluence.
        operator: What becomes of their weights; default Drop.

    Returns:
        The history that executing the plan will leave behind.

    Raises:
        InputError: If the depth, the family or the plan does not fit the model.
    """
    calibration = Calibration(model, batches)
    planner = planner if planner is not None else OneShotRanking()
    check_target_depth(target_depth, calibration.depth)
    planner.check(calibration.depth, target_depth)
    steps = planner.plan(calibration, operator if operator is not None else Drop(), target_depth)
    return MergeHistory(calibration.depth, steps, teacher=model.config.name_or_path or "")


def execute(model: PreTrainedModel, history: MergeHistory) -> None:
    """Merges an unmerged model in place as a plan says; checks the whole plan before it touches anything.

    Raises:
        InputError: If the plan is for a model of another depth or names an operator that does not exist.
    """
    depth = Calibration(model, ({},)).depth
    if history.teacher_depth != depth:
        raise InputError(f"teacher_depth={history.teacher_depth} of the plan is not the model's, which is {depth}.")
    for step in history.steps:
        from_spec(step.operator)
    surgery.apply_all(model, history.steps)


def collapse(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    target_depth: int,
    planner: Planner | None = None,
    operator: Operator | None = None,
) -> MergeHistory:
    """`plan`, then `execute`: shortens a model in place and returns what was done."""
    history = plan(model, batches, target_depth=target_depth, planner=planner, operator=operator)
    execute(model, history)
    return history


def check_target_depth(target: int, depth: int) -> None:
    """Raises InputError unless the target is at least 1 and below the model's depth."""
    if not 1 <= target < depth:
        raise InputError(
            f"target_depth={target} must lie between 1 and {depth - 1}, because the model has {depth} layers."
        )
