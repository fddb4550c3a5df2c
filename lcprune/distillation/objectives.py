"""From levels to a loss: what teacher and student have to be run for, and what becomes of it.

A level declares what it needs, and only that is computed: no head where no level reads logits, no teacher where only
labels teach, no layer behind the last that is looked at, and the layers that student and teacher share only once.
Only positions whose next token is scored (label not -100) count: padding and prompts never do. Legend: `B` batch,
`T` tokens, `N` scored positions, `D` hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lcprune.distillation.buckets import Buckets
from lcprune.distillation.head import Head
from lcprune.distillation.levels import Boundary, Labels, Level, Local, Logits, only
from lcprune.distillation.losses import HeadLoss, boundary_loss, bucket_loss, head_loss
from lcprune.distillation.passes import Call, Start, States, Wanted, forward, stream_dtype
from lcprune.distillation.teacher import Teacher, head_of
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, next_tokens
from lcprune.merging.lineage import Lineage

SCORED = "scored"
"""What a data module may call the numbers [N] of the scored positions in a batch, when it knows them."""


@dataclass(frozen=True)
class Forward:
    """A student's and a teacher's pass over the same batch."""

    batch: Batch
    """`input_ids` and `labels` [B, T]."""
    student: States
    """The student's states, with gradients."""
    student_head: Head
    """The student's, with gradients."""
    teacher: States
    """The teacher's states, by teacher layer."""
    teacher_head: Head
    """The teacher's."""
    alone: Mapping[int, Tensor] = field(default_factory=dict)
    """Merged student layer -> its output [B, T, D] when run alone; gradients stay in the layer."""
    buckets: Buckets | None = None
    """What a cache knows of the teacher's distribution [B, T], instead of its last state."""


def taught_layers(levels: Sequence[Level], lineage: Lineage) -> tuple[int, ...]:
    """Student layers whose outputs `Boundary` looks at; teacher layer `lineage[s][-1]` teaches layer s."""
    boundary = only(levels, Boundary)
    if boundary is None:
        return ()
    return tuple(s for s, ancestors in enumerate(lineage) if boundary.layers == "all" or len(ancestors) > 1)


def alone_layers(levels: Sequence[Level], lineage: Lineage) -> tuple[int, ...]:
    """Student layers that `Local` runs alone."""
    if only(levels, Local) is None:
        return ()
    return tuple(s for s, ancestors in enumerate(lineage) if len(ancestors) > 1)


def states_needed(levels: Sequence[Level], lineage: Lineage) -> set[int]:
    """Teacher layers whose outputs have to be known; the embeddings are not among them."""
    taught, alone, local = taught_layers(levels, lineage), alone_layers(levels, lineage), only(levels, Local)
    ends = {lineage[s][-1] for s in (*taught, *alone)}
    given = alone if local is not None and local.inputs == "teacher" else ()
    return ends | {lineage[s][0] - 1 for s in given if lineage[s][0] > 0}


def states_of_run(
    objectives: Sequence[Sequence[Level]], lineages: Sequence[Lineage] | None, teacher_depth: int
) -> set[int]:
    """As `states_needed`, for a whole run.

    Args:
        objectives: Of all its phases.
        lineages: Those that it trains; None = not known, then whatever a lineage could need.
        teacher_depth: Number of the teacher's layers.
    """
    if lineages is None:
        streams = any(isinstance(level, Boundary | Local) for levels in objectives for level in levels)
        return set(range(teacher_depth)) if streams else set()
    return {layer for levels in objectives for lineage in lineages for layer in states_needed(levels, lineage)}


def student_wants(levels: Sequence[Level], lineage: Lineage) -> Wanted:
    """What the student's pass has to keep."""
    taught, alone, local = taught_layers(levels, lineage), alone_layers(levels, lineage), only(levels, Local)
    head = only(levels, Logits) is not None or only(levels, Labels) is not None
    own_inputs = alone if local is not None and local.inputs == "student" else ()
    # With nothing to learn yet (Boundary or Local before the first merge) the step still has to be possible.
    return Wanted(last=head or not (taught or alone), outputs=taught, calls=own_inputs)


def teacher_forced(
    levels: Sequence[Level], lineage: Lineage, student: PreTrainedModel, teacher: PreTrainedModel
) -> dict[int, int]:
    """Student layers that `Local` gives the teacher's stream -> the ancestor that is called as each has to be.

    A merged layer is called as the teacher calls a layer of its kind: masks may differ between kinds.
    """
    layout, local = layout_of(student.config), only(levels, Local)
    alone = alone_layers(levels, lineage) if local is not None and local.inputs == "teacher" else ()
    return {s: _of_kind(layout.kind_of(student.config, s), lineage[s], teacher) for s in alone}


def ran_alone(student: PreTrainedModel, runs: Mapping[int, tuple[Call, Tensor]]) -> dict[int, Tensor]:
    """The outputs [B, T, D] of student layers that are run alone, each by how it is called and on what state."""
    layers = layout_of(student.config).layers_of(student)
    return {s: call.run(layers[s], state.detach().to(stream_dtype(layers[s]))) for s, (call, state) in runs.items()}


def run(
    levels: Sequence[Level],
    batch: Batch,
    student: PreTrainedModel,
    teacher: Teacher,
    lineage: Lineage,
    prefix: int = 0,
) -> Forward:
    """Runs teacher and student over a batch, as far as the levels need.

    Args:
        levels: What is optimized.
        batch: `input_ids` and `labels` [B, T].
        student: Descends from the teacher by `lineage`.
        teacher: The original.
        lineage: Teacher layers of every student layer.
        prefix: How many of the student's first layers are the teacher's, unchanged and frozen: run once for both.
    """
    taught, alone = taught_layers(levels, lineage), alone_layers(levels, lineage)
    wants = student_wants(levels, lineage)
    like = teacher_forced(levels, lineage, student, teacher.model)
    from_teacher = {index for s in like for index in (lineage[s][0], like[s])}
    teacher_wants = Wanted(
        last=only(levels, Logits) is not None,
        outputs=sorted({lineage[s][-1] for s in (*taught, *alone)}),
        calls=sorted(from_teacher),
    )
    shared = prefix > 0 and not wants.nothing and not teacher_wants.nothing
    if shared:
        teacher_wants = Wanted(teacher_wants.last, teacher_wants.outputs, sorted({*from_teacher, prefix}))
    theirs = teacher(batch, teacher_wants)
    start = Start(prefix, theirs.calls[prefix], theirs.layers) if shared else None
    ours = student_pass(student, batch, wants, start)
    runs = {s: (call, call.state_BTD) for s, call in ours.calls.items()}
    runs |= {s: (theirs.calls[like[s]], theirs.calls[lineage[s][0]].state_BTD) for s in like}
    return Forward(batch, ours, head_of(student), theirs, teacher.head, ran_alone(student, runs))


def student_pass(student: PreTrainedModel, batch: Batch, wants: Wanted, start: Start | None = None) -> States:
    """What the student's pass keeps, with gradients where it learns by it and not where it only feeds layers alone."""
    learns = wants.last or bool(wants.outputs)
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
        return forward(student, batch, wants, start)


def _of_kind(kind: tuple[object, ...], ancestors: Sequence[int], teacher: PreTrainedModel) -> int:
    layout = layout_of(teacher.config)
    return next((index for index in ancestors if layout.kind_of(teacher.config, index) == kind), ancestors[0])


def objective(levels: Sequence[Level], forward: Forward, lineage: Lineage, progress: float = 0.0) -> dict[str, Tensor]:
    """The terms by metric name, unweighted and detached, and their weighted sum as `loss` with a gradient.

    All are means over the scored positions of the batch.

    Args:
        levels: What is optimized.
        forward: What `run` returned for these levels.
        lineage: Teacher layers of every student layer.
        progress: How much of the phase is over, from 0 to 1.
    """
    scored = with_scored(forward.batch)[SCORED]
    logits, labels = only(levels, Logits), only(levels, Labels)
    terms: dict[str, Tensor] = {}
    loss = torch.zeros((), device=scored.device)
    if logits is not None or labels is not None:
        assert forward.student.last is not None
        head = _head_loss(forward, at(scored, forward.student.last), scored, logits, labels)
        loss = loss + head.total
        terms |= {"logits": head.logits} if logits is not None else {}
        terms |= {"labels": head.labels} if labels is not None else {}
    boundary, local = only(levels, Boundary), only(levels, Local)
    taught = taught_layers(levels, lineage)
    if boundary is not None and taught:
        mean = _distance({s: forward.student.layers[s] for s in taught}, forward, scored, lineage, boundary.distance)
        weight = boundary.weight_at(progress)
        if boundary.scale == "logits":
            loss = loss + weight * mean * (terms["logits"] / mean.detach().clamp_min(1e-12))
        else:
            loss = loss + weight * mean
        terms["boundary"] = mean.detach()
    if local is not None and forward.alone:
        mean = _distance(forward.alone, forward, scored, lineage, local.distance)
        loss = loss + local.weight * mean
        terms["local"] = mean.detach()
    if not terms:
        assert forward.student.last is not None
        loss = loss + 0 * at(scored, forward.student.last).float().sum()
    return {"loss": loss, **terms}


def _head_loss(
    forward: Forward, student_ND: Tensor, scored_N: Tensor, logits: Logits | None, labels: Labels | None
) -> HeadLoss:
    targets_N = at(scored_N, next_tokens(forward.batch))
    logits_weight = 0.0 if logits is None else logits.weight
    labels_weight = 0.0 if labels is None else labels.weight
    known = forward.buckets
    if known is not None:
        return bucket_loss(
            student_ND,
            forward.student_head,
            Buckets(at(scored_N, known.ids), at(scored_N, known.log_p), at(scored_N, known.log_tail)),
            targets_N=targets_N,
            logits_weight=logits_weight,
            labels_weight=labels_weight,
        )
    return head_loss(
        student_ND,
        forward.student_head,
        # Labels alone need no teacher.
        student_ND.detach() if forward.teacher.last is None else at(scored_N, forward.teacher.last),
        forward.teacher_head,
        targets_N=targets_N,
        divergence=None if logits is None else logits.formula,
        logits_weight=logits_weight,
        labels_weight=labels_weight,
    )


def _distance(outputs: Mapping[int, Tensor], forward: Forward, scored_N: Tensor, lineage: Lineage, kind: str) -> Tensor:
    """Mean distance of these layers' outputs to the teacher's stream behind their last ancestors."""
    distances = [
        boundary_loss(at(scored_N, output), at(scored_N, forward.teacher.layers[lineage[s][-1]]), kind=kind)  # type: ignore[arg-type]
        for s, output in outputs.items()
    ]
    return torch.stack(distances).mean()


def scored_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Which positions [B, T] have a next token that counts."""
    return next_tokens(batch) != -100


def with_scored(batch: Batch) -> Batch:
    """The batch with the numbers [N] of its scored positions among all B * T: its own, or found now.

    How many there are decides the shapes of a loss. Where a batch does not say, a GPU has to be waited for.
    """
    if SCORED in batch:
        return batch
    return {**batch, SCORED: scored_positions(batch).flatten().nonzero().squeeze(1)}


def at(scored_N: Tensor, values_BT: Tensor) -> Tensor:
    """Of values [B, T, ...] those at the scored positions, [N, ...]."""
    return values_BT.flatten(0, 1).index_select(0, scored_N)
