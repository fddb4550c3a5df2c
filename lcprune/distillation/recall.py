"""A training step whose teacher does not run: what it would say comes from a cache (cache.py).

    Logits      its likeliest tokens, and all others in one bucket (buckets.py)
    Boundary    its stream behind the layers that the cache keeps
    Local       the same; how a layer is called (masks, positions) comes from the teacher's embeddings on, which are a
                look-up, and no layer of it is run

The student runs its frozen prefix itself, without gradients: there is no pass of the teacher's to take it from.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from lcprune.distillation.cache import TeacherCache, rows_of
from lcprune.distillation.levels import Level, Logits, only
from lcprune.distillation.objectives import (
    Forward,
    ran_alone,
    states_needed,
    student_pass,
    student_wants,
    teacher_forced,
)
from lcprune.distillation.passes import States
from lcprune.distillation.teacher import Teacher, head_of
from lcprune.merging.calibration import Batch
from lcprune.merging.lineage import Lineage


def run(
    levels: Sequence[Level],
    batch: Batch,
    student: PreTrainedModel,
    teacher: Teacher,
    lineage: Lineage,
    cache: TeacherCache,
) -> Forward:
    """What `objectives.run` returns, with the teacher's side out of a cache.

    Args:
        levels: What is optimized; as `cache.check_levels` accepts.
        batch: `input_ids` and `labels` [B, T]; whole blocks.
        student: Descends from the teacher by `lineage`.
        teacher: The original; only asked how it would call its layers.
        lineage: Teacher layers of every student layer.
        cache: Has these blocks, and the states that the levels need.
    """
    found = cache.look_up(rows_of(batch), states_needed(levels, lineage))
    like = teacher_forced(levels, lineage, student, teacher.model)
    calls = teacher.calls(batch, sorted({0, *like.values()} if like else ()))
    ours = student_pass(student, batch, student_wants(levels, lineage))
    runs = {s: (call, call.state_BTD) for s, call in ours.calls.items()}
    for s, index in like.items():
        first = lineage[s][0]
        runs[s] = calls[index], found.states[first - 1] if first else calls[0].state_BTD
    return Forward(
        batch,
        ours,
        head_of(student),
        States(None, dict(found.states)),
        teacher.head,
        ran_alone(student, runs),
        found.buckets if only(levels, Logits) is not None else None,
    )
