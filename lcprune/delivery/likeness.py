"""How much of the teacher is in the student, looked at with the weights of both on a little text.

    kinship[s] = E cos(h_s, H_t)     h_s: the student's stream after its layer s; H_t: the teacher's after t, the last
                                     teacher layer that s descends from

Legend: `B` batch, `T` tokens, `N` unmasked tokens, `D` hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, evaluating, hidden_states, layer_outputs, mask_of, unmasked
from lcprune.merging.collapse import execute
from lcprune.merging.double import total
from lcprune.merging.heatmaps import WeightDistances, state_cosines, weight_distances
from lcprune.merging.lineage import Lineage, MergeHistory
from lcprune.merging.progress import track


@dataclass(frozen=True)
class Inside:
    """What one model's layers have in common."""

    cosines: tuple[tuple[float, ...], ...]
    """Mean cosine of the stream between every two boundaries."""
    weights: WeightDistances
    """Between neighbours."""


@dataclass(frozen=True)
class Likeness:
    """Teacher and student, looked at on the same tokens."""

    tokens: int
    """Calibration tokens behind the figures."""
    teacher: Inside
    """The teacher's layers."""
    student: Inside
    """The student's layers."""
    kinship: tuple[float, ...]
    """Per student layer, at the end of the run."""


def compare(teacher: PreTrainedModel, student: PreTrainedModel, lineage: Lineage, batches: Sequence[Batch]) -> Likeness:
    """Looks at both models; neither is changed.

    Args:
        teacher: The original.
        student: Of as many layers as the lineage has.
        lineage: Teacher layers of every student layer.
        batches: Calibration batches.
    """
    masks = [mask_of(batch) for batch in batches]
    return Likeness(
        tokens=sum(
            batch["input_ids"].numel() if mask is None else int(mask.sum())
            for batch, mask in zip(batches, masks, strict=True)
        ),
        teacher=_inside(teacher, batches),
        student=_inside(student, batches),
        kinship=kinship(teacher, student, lineage, batches),
    )


def kinship(
    teacher: PreTrainedModel, student: PreTrainedModel, lineage: Lineage, batches: Sequence[Batch]
) -> tuple[float, ...]:
    """Mean cosine, over all unmasked tokens, of every student layer's stream with that of its last teacher layer."""
    originals, layers = (layout_of(model.config).layers_of(model) for model in (teacher, student))
    last = [ancestors[-1] for ancestors in lineage]
    sums, tokens = [0.0] * len(lineage), 0
    with (
        evaluating(teacher),
        evaluating(student),
        layer_outputs(originals, sorted(set(last))) as expected,
        layer_outputs(layers, range(len(layers))) as received,
    ):
        for batch in track(batches, "comparing student and teacher"):
            hidden_states(teacher, batch)
            hidden_states(student, batch)
            for layer, ancestor in enumerate(last):
                cosine_N = _cosine(received.pop(layer), expected[ancestor], mask_of(batch))
                sums[layer] += total(cosine_N)
            tokens += len(cosine_N)
            expected.clear()
    return tuple(cosines / tokens for cosines in sums)


def merge_untrained(
    model: PreTrainedModel, begun: MergeHistory, history: MergeHistory, batches: Sequence[Batch]
) -> None:
    """Merges a model in place as a run did, without the training in between.

    Args:
        model: Where the run began: the teacher, or a student that was shortened before.
        begun: How that came from the teacher.
        history: The run's, to its end.
        batches: For operators that look at text.

    Raises:
        InputError: If the run refitted what it merged, which is not done again, or an operator cannot be found.
    """
    rest = history.after(begun)
    if rest is None:
        raise InputError("the history does not go on from where the run began")
    if any(step.refit is not None for step in rest.steps):
        raise InputError("the run refitted what it merged, on the student as it was trained by then")
    if rest.steps:
        execute(model, rest, batches)


def _inside(model: PreTrainedModel, batches: Sequence[Batch]) -> Inside:
    cosines = state_cosines(model, batches).tolist()
    return Inside(tuple(map(tuple, cosines)), weight_distances(model))


def _cosine(one_BTD: Tensor, other_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    one_ND, other_ND = unmasked(one_BTD, mask_BT).float(), unmasked(other_BTD, mask_BT).float()
    return cosine_similarity(one_ND, other_ND.to(one_ND.device), dim=-1)
