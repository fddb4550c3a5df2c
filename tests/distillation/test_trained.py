"""What is trained has storage of its own; what is not is the teacher's; a prefix is what neither touches."""

import pytest
import torch

from lcprune.distillation.passes import frozen_prefix
from lcprune.distillation.teacher import second_view
from lcprune.distillation.trained import Trained, ever_trained, train, trained_layers, trained_parameters
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, spec_of
from tests.builders import tiny_llama
from tests.merging.planning import layers_of

STEP = MergeStep((2, 3), spec_of(Drop("first")), (0.5, 0.5))
LINEAGE = MergeHistory(6, (STEP,)).lineage


def _student():
    teacher = tiny_llama()
    student = second_view(teacher)
    surgery.apply(student, STEP)
    return student, teacher


@pytest.mark.parametrize(
    ("what", "expected"),
    [("merged", (2,)), ("after_merge", (2, 3, 4)), ("layers", (0, 1, 2, 3, 4)), ("all", (0, 1, 2, 3, 4))],
)
def test_layers_that_are_trained_follow_from_the_lineage(what: Trained, expected: tuple[int, ...]):
    assert trained_layers(what, LINEAGE) == expected


def test_nothing_is_merged_before_the_first_merge():
    assert trained_layers("merged", MergeHistory(4).lineage) == ()
    assert trained_layers("after_merge", MergeHistory(4).lineage) == ()


@pytest.mark.parametrize(("what", "prefix"), [("merged", 2), ("after_merge", 2), ("layers", 0), ("all", 0)])
def test_training_moves_what_is_chosen_and_the_teacher_keeps_its_tensors(what: Trained, prefix: int):
    student, teacher = _student()
    before = {name: parameter.detach().clone() for name, parameter in teacher.named_parameters()}
    chosen = trained_parameters(student, what, LINEAGE)
    train(student, teacher, chosen, torch.float32)
    assert {id(p) for p in student.parameters() if p.requires_grad} == {id(p) for p in chosen}
    assert frozen_prefix(student, LINEAGE) == prefix
    with torch.no_grad():
        for parameter in chosen:
            parameter.add_(1)
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert set(map(id, chosen)) <= set(map(id, ever_trained(student, [what])))


def test_what_stops_being_trained_keeps_its_values_and_loses_its_gradient():
    student, teacher = _student()
    train(student, teacher, trained_parameters(student, "all", LINEAGE), torch.float32)
    weight = layers_of(student)[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.add_(1)
    weight.grad, value = torch.ones_like(weight), weight.detach().clone()
    train(student, teacher, trained_parameters(student, "merged", LINEAGE), torch.float32)
    assert weight.grad is None
    assert torch.equal(weight, value)


def test_trained_weights_take_the_type_that_is_asked_for():
    student, teacher = tiny_llama(dtype=torch.bfloat16), tiny_llama(dtype=torch.bfloat16)
    surgery.apply(student, STEP)
    train(student, teacher, trained_parameters(student, "merged", LINEAGE), torch.float32)
    assert {p.dtype for p in layers_of(student)[2].parameters()} == {torch.float32}
    assert {p.dtype for p in layers_of(student)[3].parameters()} == {torch.bfloat16}
