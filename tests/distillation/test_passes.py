"""A pass that starts or stops early sees what a whole one sees."""

import pytest
import torch

from lcprune.distillation.passes import Start, Wanted, calls_without_running, forward
from lcprune.distillation.teacher import recompute_activations, second_view
from lcprune.merging.calibration import Batch, hidden_states
from tests.builders import ALL_FAMILIES, Family, tiny_llama, token_batches
from tests.merging.planning import layers_of

BATCH: Batch = {"input_ids": token_batches(1, 2, 12)[0]}


def _ran(model: torch.nn.Module) -> list[int]:
    """Fills up with the numbers of the layers whose forward runs."""
    seen: list[int] = []
    for index, layer in enumerate(layers_of(model)):  # type: ignore[arg-type]
        layer.register_forward_hook(lambda *_, index=index: seen.append(index))
    return seen


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_student_that_is_handed_the_prefix_computes_the_same(family: Family):
    teacher = tiny_llama(model_type=family)
    student = second_view(teacher)
    with torch.no_grad():
        whole = forward(student, BATCH, Wanted(outputs=(1, 4)))
        given = forward(teacher, BATCH, Wanted(outputs=(1,), calls=(3,)))
        seen = _ran(student)
        resumed = forward(student, BATCH, Wanted(outputs=(1, 4)), Start(3, given.calls[3], given.layers))
    assert seen == [3, 4, 5]
    for state, expected in ((resumed.last, whole.last), *((resumed.layers[s], whole.layers[s]) for s in (1, 4))):
        torch.testing.assert_close(state, expected)
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(student, BATCH), whole.last)
    assert seen == [3, 4, 5, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_layer_called_as_the_model_called_it_gives_what_it_gave(family: Family):
    model = tiny_llama(model_type=family)
    with torch.no_grad():
        states = forward(model, BATCH, Wanted(last=False, outputs=(2,), calls=(2,)))
        call = states.calls[2]
        torch.testing.assert_close(call.run(layers_of(model)[2], call.state_BTD), states.layers[2])


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_layers_that_do_not_run_are_called_as_those_that_do(family: Family):
    model, batch = tiny_llama(model_type=family), {"input_ids": token_batches()[0]}
    wanted = (0, 3, 5)
    with torch.no_grad():
        without = calls_without_running(model, batch, wanted)
        real = forward(model, batch, Wanted(calls=wanted)).calls
    assert without[0].state_BTD.equal(real[0].state_BTD)
    for index in wanted:
        assert without[index].state_BTD.shape == real[index].state_BTD.shape
        assert without[index].in_tuple == real[index].in_tuple
        assert without[index].arguments.keys() == real[index].arguments.keys()


def test_pass_ends_behind_the_last_layer_that_is_wanted():
    model = tiny_llama()
    seen = _ran(model)
    states = forward(model, BATCH, Wanted(last=False, outputs=(1,), calls=(3,)))
    assert seen == [0, 1, 2, 3]
    assert states.last is None
    assert (set(states.layers), set(states.calls)) == ({1}, {3})
    assert forward(model, BATCH, Wanted(last=False)).layers == {}
    assert seen == [0, 1, 2, 3]


def test_gradient_ends_where_the_student_was_handed_over():
    teacher, student = tiny_llama(), tiny_llama()
    with torch.no_grad():
        given = forward(teacher, BATCH, Wanted(calls=(2,)))
    forward(student, BATCH, Wanted(), Start(2, given.calls[2], {})).last.sum().backward()  # type: ignore[union-attr]
    reached = [layer.mlp.down_proj.weight.grad is not None for layer in layers_of(student)]
    assert reached == [False, False, True, True, True, True]
    assert student.get_input_embeddings().weight.grad is None


def test_prefix_of_a_checkpointed_student_is_stood_in_for_too():
    teacher, student = tiny_llama(), tiny_llama().train()
    recompute_activations(student)
    with torch.no_grad():
        given = forward(teacher, BATCH, Wanted(calls=(2,)))
        expected = forward(teacher, BATCH, Wanted()).last
    last = forward(student, BATCH, Wanted(), Start(2, given.calls[2], {})).last
    assert last is not None
    torch.testing.assert_close(last, expected)
    last.sum().backward()
    assert layers_of(student)[2].mlp.down_proj.weight.grad is not None
