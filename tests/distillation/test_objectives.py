"""Which layers are taught by which, what counts, and that the loss is the sum that is written down."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from lcprune.distillation.objectives import (
    Boundary,
    Forward,
    Labels,
    Level,
    Logits,
    check,
    next_tokens,
    objective,
    scored_positions,
    taught_layers,
)
from lcprune.distillation.teacher import Teacher, forward, head_weight, second_view
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeHistory, MergeStep
from tests import builders

UNMERGED = MergeHistory(6)
MERGED = MergeHistory(6, (MergeStep((1, 2, 3), {"class_path": "Drop"}, (1.0, 0.0, 0.0)),))
EVERY: tuple[Level, ...] = (Logits(0.7, 2.0), Boundary(0.5, "mse", "all"), Labels(0.3))


def passes(
    batch: Mapping[str, Tensor], history: MergeHistory, levels: tuple[Level, ...]
) -> tuple[Forward, PreTrainedModel, PreTrainedModel]:
    """Both passes over a batch, and the two models."""
    model = builders.tiny_llama()
    student = second_view(model)
    surgery.apply_all(student, history.steps)
    teacher = Teacher(model)
    layers = taught_layers(levels, history.lineage)
    states = teacher(batch, [history.lineage[s][-1] for s in layers])
    return (
        Forward(batch, forward(student, batch, layers), head_weight(student), states, teacher.head),
        student,
        model,
    )


@pytest.mark.parametrize(
    ("levels", "taught"),
    [
        ((Logits(),), ()),
        ((Logits(), Boundary()), (1,)),
        ((Boundary(layers="all"),), (0, 1, 2, 3)),
    ],
)
def test_taught_layers_follow_the_lineage(levels: tuple[Level, ...], taught: tuple[int, ...]):
    assert MERGED.lineage == ((0,), (1, 2, 3), (4,), (5,))
    assert taught_layers(levels, MERGED.lineage) == taught
    assert taught_layers((Boundary(),), UNMERGED.lineage) == ()


def test_next_tokens_are_the_labels_moved_by_one():
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, -100, 7]])}
    assert next_tokens(batch).tolist() == [[-100, 7, -100]]
    assert scored_positions(batch).tolist() == [[False, True, False]]
    assert next_tokens({"input_ids": batch["input_ids"]}).tolist() == [[6, 7, -100]]


def test_loss_is_the_sum_that_is_written_down(batch: dict[str, Tensor]):
    batch["labels"][0, :5] = -100
    both, student, teacher = passes(batch, MERGED, EVERY)
    terms = objective(EVERY, both, MERGED.lineage)
    keep = scored_positions(batch)
    assert keep.sum() == 2 * 15 - 4
    with torch.no_grad():
        student_logits = student(batch["input_ids"]).logits[keep]
        output = teacher(batch["input_ids"], output_hidden_states=True)
        theirs = (output.logits[keep] / 2).log_softmax(-1)
        ours = (student_logits / 2).log_softmax(-1)
        logits = 4 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
        labels = cross_entropy(student_logits, next_tokens(batch)[keep])
        # HF's hidden_states[l + 1] is the output of layer l, for all but the last
        mine = student(batch["input_ids"], output_hidden_states=True).hidden_states
        pairs = [(both.student.layers[3], both.teacher.layers[5])]
        pairs += [(mine[s + 1], output.hidden_states[t + 1]) for s, t in ((0, 0), (1, 3), (2, 4))]
        relative = [((s - t)[keep].pow(2).sum(-1) / t[keep].pow(2).sum(-1)).mean() for s, t in pairs]
        boundary = torch.stack(relative).mean()
    torch.testing.assert_close(terms["logits"], logits)
    torch.testing.assert_close(terms["labels"], labels)
    torch.testing.assert_close(terms["boundary"], boundary)
    torch.testing.assert_close(terms["loss"], 0.7 * logits + 0.5 * boundary + 0.3 * labels)
    assert terms["loss"].requires_grad
    assert not any(terms[name].requires_grad for name in ("logits", "labels", "boundary"))


def test_merged_layer_is_taught_by_where_its_last_ancestor_ended(batch: dict[str, Tensor]):
    levels = (Boundary(),)
    both, student, teacher = passes(batch, MERGED, levels)
    with torch.no_grad():
        goal = teacher(batch["input_ids"], output_hidden_states=True).hidden_states[4]
        mine = student(batch["input_ids"], output_hidden_states=True).hidden_states[2]
        expected = (1 - cosine_similarity(mine, goal, dim=-1))[:, :-1].mean()
    torch.testing.assert_close(objective(levels, both, MERGED.lineage)["loss"], expected)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_unmerged_student_has_nothing_to_learn(batch: dict[str, Tensor], kind: str):
    levels = (Logits(), Boundary(distance=kind, layers="all"))  # type: ignore[arg-type]
    both, _, _ = passes(batch, UNMERGED, levels)
    terms = objective(levels, both, UNMERGED.lineage)
    assert terms["logits"].item() == pytest.approx(0, abs=1e-6)
    assert terms["boundary"].item() == pytest.approx(0, abs=1e-6)
    both, _, _ = passes(batch, MERGED, levels)
    terms = objective(levels, both, MERGED.lineage)
    assert terms["logits"].item() > 0.01
    assert terms["boundary"].item() > 0.01


def test_labels_of_minus_100_never_count(batch: dict[str, Tensor]):
    # Causal: what stands behind the last scored label can change nothing.
    batch["labels"][:, 9:] = -100
    first = objective(EVERY, passes(batch, MERGED, EVERY)[0], MERGED.lineage)
    batch["input_ids"][:, 9:] = 3
    second = objective(EVERY, passes(batch, MERGED, EVERY)[0], MERGED.lineage)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=name)


def test_batch_without_a_scored_label_gives_zero_with_a_gradient(batch: dict[str, Tensor]):
    batch["labels"][:] = -100
    both, student, _ = passes(batch, MERGED, EVERY)
    loss = objective(EVERY, both, MERGED.lineage)["loss"]
    assert loss.item() == 0
    loss.backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("level", EVERY)
def test_terms_are_those_of_the_levels_named(batch: dict[str, Tensor], level: Level):
    terms = objective((level,), passes(batch, MERGED, (level,))[0], MERGED.lineage)
    name = type(level).__name__.lower()
    assert set(terms) == {"loss", name}
    torch.testing.assert_close(terms["loss"], level.weight * terms[name])


def test_boundary_alone_can_be_stepped_before_the_first_merge(batch: dict[str, Tensor]):
    both, _, _ = passes(batch, UNMERGED, (Boundary(),))
    loss = objective((Boundary(),), both, UNMERGED.lineage)["loss"]
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("levels", [(), (Logits(), Logits(0.5)), (Boundary(), Logits(), Boundary(layers="all"))])
def test_check_refuses_no_level_and_the_same_twice(levels: tuple[Level, ...]):
    with pytest.raises(InputError, match="objective="):
        check(levels)


@pytest.mark.parametrize("kind", [Logits, Boundary, Labels])
@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_level_refuses_a_weight_that_is_not_positive(kind: type[Level], weight: float):
    with pytest.raises(InputError, match=f"weight={weight} of {kind.__name__}"):
        kind(weight)  # type: ignore[call-arg]


def test_logits_refuse_a_temperature_that_is_not_positive():
    with pytest.raises(InputError, match="temperature=0"):
        Logits(temperature=0)


@pytest.mark.parametrize("wrong", [{"distance": "l1"}, {"layers": "some"}])
def test_boundary_refuses_a_word_it_does_not_know(wrong: dict[str, str]):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Boundary(**wrong)  # type: ignore[arg-type]
