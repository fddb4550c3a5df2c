"""A shorter model without any training: plan, then merge. What `lcprune collapse` and a notebook call.

history = collapse(model, batches, target_depth=24)          # model is changed in place
history = plan(model, batches, target_depth=24)              # nothing is touched; or target_params="100M" ...
execute(model, history, batches)                             # ... until now, perhaps after editing it
history = collapse(model, batches, target_depth=20, history=history)   # goes on from there; all merges are in it
"""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import refit as refits
from lcprune.merging import specs, surgery
from lcprune.merging.activity import KnownActivity, Measure
from lcprune.merging.architectures import check_weights, layout_of
from lcprune.merging.budget import Budget, PerplexityRatio, feasible_depths, one_of
from lcprune.merging.budget import check_target_depth as check_target_depth
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.checks import check_kind, check_model, checked_batches
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, from_spec
from lcprune.merging.planners import OneShotRanking, Planner
from lcprune.merging.progress import track
from lcprune.merging.refit import Refit
from lcprune.merging.remeasure import Trail
from lcprune.merging.streams import FadingStream, Stream, regrouped
from lcprune.merging.within import plan_within

MARK = "_lcprune_history"
"""Attribute of a merged model in memory: its history as JSON. A deep copy has it, no state dict and no saved folder."""


def plan(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    target_depth: int | str | None = None,
    target_params: int | float | str | None = None,
    target_size: int | float | str | None = None,
    max_perplexity_ratio: float | None = None,
    planner: Planner | None = None,
    operator: Operator | None = None,
    refit: Refit | None = None,
    history: MergeHistory | None = None,
    known: KnownActivity | None = None,
) -> MergeHistory:
    """Plans how to shorten a model; leaves it as it is.

    Args:
        model: A causal LM of a known family.
        batches: Calibration batches, `input_ids` [B, T] each.
        target_depth: How short, in layers, or as the share of them that remains, such as "75%" (to the nearest whole
            one); a planner with a threshold of its own may stop before. Give one of four.
        target_params: How short, in parameters at most, such as "100M".
        target_size: How short, in bytes at most on disk in the model's dtype, such as "200MB".
        max_perplexity_ratio: As short as the calibration perplexity stays below this multiple of the model's own.
        planner: Which layers merge; default OneShotRanking by BlockInfluence.
        operator: What becomes of their weights; default Drop.
        refit: How the merged model is repaired; default not at all.
        history: How a model that was shortened before came from the original; None = it was not. What planners compare
            with, and refits aim at, is then the model as it stands.
        known: Takes what the planner measures of the model on the batches; hand it to `execute` with the same two.

    Returns:
        The history that executing the plan will leave behind, earlier merges included.

    Raises:
        InputError: If the budget, the family or the plan does not fit the model, or the model was shortened before in
            this process and `history` does not say how.
    """
    budget = one_of(
        target_depth=target_depth,
        target_params=target_params,
        target_size=target_size,
        max_perplexity_ratio=max_perplexity_ratio,
    )
    if budget is None:
        raise InputError("How short? Give target_depth, target_params, target_size or max_perplexity_ratio.")
    planner = planner if planner is not None else OneShotRanking()
    operator = operator if operator is not None else Drop()
    _check_kinds(model, planner, operator, refit)
    done = _done(model, history, budget)
    calibration = Calibration(model, batches, history=history, known=known if known is not None else KnownActivity())
    check(model, budget, planner, operator, refit, done)
    planner.check_text(calibration.batches)
    if refit is not None:
        refit.check_text(calibration.batches)
    target = budget.depth(model)
    if isinstance(budget, PerplexityRatio):
        steps = plan_within(calibration, planner, operator, budget, refit)
    else:
        assert target is not None
        steps = planner.plan(calibration, operator, target)
        budget.check_reached(planner, MergeHistory(calibration.depth, steps).depth, target)
    return done.extend(with_refit(steps, refit))


def _check_kinds(model: PreTrainedModel, planner: Planner, operator: Operator, refit: Refit | None) -> None:
    check_model(model)
    check_kind("planner", planner, Planner, "lcprune.OneShotRanking()")
    check_kind("operator", operator, Operator, "lcprune.Drop()")
    if refit is not None:
        check_kind("refit", refit, Refit, "lcprune.RidgeRefit()")


def _done(model: PreTrainedModel, history: MergeHistory | None, budget: Budget) -> MergeHistory:
    """How the model came to be as it is; raises InputError if that is not known, or does not fit it."""
    depth = len(layout_of(model.config).layers_of(model))
    if history is None:
        if (before := remembered(model)) is not None:
            raise InputError(
                f"The model has been shortened before, from {before.teacher_depth} layers to {before.depth}: go on "
                "from that with history=h1, h1 being what lcprune.collapse returned then (or the plan executed)."
            )
        return MergeHistory(depth, teacher=model.config.name_or_path or "")
    check_kind("history", history, MergeHistory, "lcprune.load_history(FOLDER)")
    if history.depth != depth:
        raise InputError(
            f"history ends with {history.depth} layers, the model has {depth}: give the whole history of this model, "
            "as lcprune.collapse or lcprune.distill returned it last or lcprune.load_history reads it."
        )
    if history.steps and isinstance(budget, PerplexityRatio):
        raise InputError(
            f"max_perplexity_ratio={budget.max_perplexity_ratio} is about the original, and the model has been "
            "shortened before: give target_depth, target_params or target_size."
        )
    return history


def remember(model: PreTrainedModel, history: MergeHistory) -> None:
    """Notes on a model in memory how it came to be, so that nobody takes it for an original."""
    if history.steps:
        vars(model)[MARK] = history.to_json()


def remembered(model: PreTrainedModel) -> MergeHistory | None:
    """How a model in memory came to be; None if it has not been merged in this process."""
    noted = vars(model).get(MARK)
    return None if noted is None else MergeHistory.from_json(noted)


def check(
    model: PreTrainedModel,
    budget: Budget,
    planner: Planner,
    operator: Operator,
    refit: Refit | None,
    done: MergeHistory | None = None,
) -> None:
    """Refuses what can be known to fail from shapes alone: a model on the meta device will do.

    Args:
        model: To become shorter.
        budget: How short.
        planner: Which layers merge.
        operator: What becomes of their weights.
        refit: How the merged model is repaired.
        done: How the model came to be as it is; None = it is the original.

    Raises:
        InputError: If the model has adapters or packed weights, cannot become so short, or planner, operator or refit
            do not fit it.
    """
    check_weights(model)
    layout = layout_of(model.config)
    planner.check_family(layout)
    depth, target = len(layout.layers_of(model)), budget.depth(model)
    if target is None:
        feasible_depths(planner, depth)
    else:
        check_target(planner, done if done is not None else MergeHistory(depth), target)
    specs.check_nameable(Operator, operator)
    operator.check(layout)
    if refit is not None:
        specs.check_nameable(Refit, refit)
        refit.check(layout)


def check_target(planner: Planner, done: MergeHistory, target: int) -> None:
    """Raises InputError if it is known that the planner does not get a model of this history down to a depth."""
    after = planner.foresee(done.lineage, target) if done.steps else None
    if after is None:
        planner.check(done.depth, target)
    elif len(after) > target:
        raise InputError(
            f"{planner} leaves {len(after)} of the student's {done.depth} layers, {target} are asked for: "
            "name more groups or raise the target depth."
        )


def check_plan(model: PreTrainedModel, history: MergeHistory) -> None:
    """Refuses a plan that shapes alone show not to fit: a model on the meta device will do.

    Raises:
        InputError: The model has adapters or packed weights, the plan is for one of another depth, or an operator or
            refit of it does not exist, does not take its arguments or does not fit the family.
    """
    check_weights(model)
    layout = layout_of(model.config)
    depth = len(layout.layers_of(model))
    if history.teacher_depth != depth:
        raise InputError(
            f"teacher_depth={history.teacher_depth} of the plan is not the model's, which is {depth}: load the model "
            "that the plan begins with, or execute only what is left, plan.after(history of the model)."
        )
    for step in history.steps:
        from_spec(step.operator).check(layout)
        if step.refit is not None:
            refits.from_spec(step.refit).check(layout)


def execute(
    model: PreTrainedModel,
    history: MergeHistory,
    batches: Sequence[Batch] = (),
    *,
    known: KnownActivity | None = None,
) -> None:
    """Merges a model in place as a plan says; checks the whole plan before it touches anything.

    Args:
        model: A causal LM of a known family.
        history: The plan, for the model as it stands; or one that begins with the merges that it has from this process.
        batches: Calibration batches; refits and operators that look at what layers do on text (`Concat`) need them.
        known: What `plan` measured of this model on these batches: it is not measured again.

    Raises:
        InputError: If the plan is for a model of another depth, or names an operator that does not exist, does not
            fit the family, or needs batches where there are none.
    """
    check_model(model)
    check_kind("history", history, MergeHistory, "lcprune.plan(...) or lcprune.load_history(FOLDER)")
    batches = checked_batches(batches)
    depth, before = len(layout_of(model.config).layers_of(model)), remembered(model)
    if before is None or before.depth != depth:
        before = MergeHistory(depth, teacher=history.teacher)
    rest = history.after(before) if history.teacher_depth != depth else None
    if rest is None:
        _carry_out(model, history, batches, known)
        remember(model, before.extend(history.steps))
    else:
        _carry_out(model, rest, batches, known, before.steps)
        remember(model, history)


def _carry_out(
    model: PreTrainedModel,
    history: MergeHistory,
    batches: Sequence[Batch],
    known: KnownActivity | None,
    earlier: tuple[MergeStep, ...] = (),
) -> None:
    """`execute` for a plan that begins with the model as it stands, `earlier` being the merges that `known` counts."""
    check_plan(model, history)
    depth = history.teacher_depth
    for operator in (from_spec(step.operator) for step in history.steps):
        if operator.needs_activity and not batches:
            raise InputError(f"operator {type(operator).__name__} of the plan needs text: give calibration batches.")
    repairs = [number for number, step in enumerate(history.steps) if step.refit is not None]
    for number in repairs:
        if not batches:
            raise InputError("The plan refits the merged model, which needs text: give calibration batches.")
        refits.from_spec(history.steps[number].refit or {}).check_text(batches)
    teacher = surgery.second_view(model) if repairs else None
    trail = Trail(model, batches) if batches else None
    done = repaired = MergeHistory(depth)
    for number, step in enumerate(track(history.steps, "merging layers")):
        surgery.apply(model, step, _measure((*earlier, *done.steps), trail, known))
        done = done.append(step)
        if trail is not None:
            trail.forget(step.base)
        if teacher is not None and step.refit is not None:
            # After the last refit nobody needs the original any more: its layers may go as they are passed.
            kind = FadingStream if number == repairs[-1] else Stream
            text, trail = regrouped(batches, model), None
            refits.repair(Stream(model, text), kind(teacher, text), done, repaired)
            repaired, trail = done, Trail(model, batches)


def _measure(done: Sequence[MergeStep], trail: Trail | None, known: KnownActivity | None) -> Measure | None:
    """The activity of the model after these merges: known, or from a walk along the trail."""
    if trail is None:
        return None
    found = known if known is not None else KnownActivity()
    return lambda wanted: found.find(done, wanted) or trail.activity(wanted)


def collapse(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    target_depth: int | str | None = None,
    target_params: int | float | str | None = None,
    target_size: int | float | str | None = None,
    max_perplexity_ratio: float | None = None,
    planner: Planner | None = None,
    operator: Operator | None = None,
    refit: Refit | None = None,
    history: MergeHistory | None = None,
) -> MergeHistory:
    """`plan`, then `execute`: shortens a model in place and returns what was done, all merges of `history` before."""
    known, batches = KnownActivity(), checked_batches(batches)
    whole = plan(
        model,
        batches,
        target_depth=target_depth,
        target_params=target_params,
        target_size=target_size,
        max_perplexity_ratio=max_perplexity_ratio,
        planner=planner,
        operator=operator,
        refit=refit,
        history=history,
        known=known,
    )
    earlier = () if history is None else history.steps
    rest = whole if history is None else whole.after(history)
    assert rest is not None  # it goes on from there
    _carry_out(model, rest, batches, known, earlier)
    remember(model, whole)
    return whole


def with_refit(steps: Sequence[MergeStep], refit: Refit | None) -> tuple[MergeStep, ...]:
    """The steps, the last of them followed by a refit."""
    if refit is None or not steps:
        return tuple(steps)
    return (*steps[:-1], replace(steps[-1], refit=refits.spec_of(refit)))
