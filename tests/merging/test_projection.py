"""What one projection is fitted on, what it is judged by, and when its weights stay as they are."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lcprune.merging.architectures import LayerLayout, layout_of
from lcprune.merging.observation import observe
from lcprune.merging.projection import ProjectionFit
from lcprune.merging.regression import held_out_sequences, token_weights
from lcprune.merging.streams import Stream
from tests.builders import Family, tiny_llama
from tests.merging.planning import layers_of
from tests.merging.test_refit import BATCHES, FIRST, _merged

HELD_OUT = 0.25


def _before_the_merge(family: Family = "llama") -> tuple[Stream, list[Tensor], nn.Module, LayerLayout]:
    """The student's stream before its merged layer, the teacher's behind the ancestors, the layer, its layout."""
    student, teacher, _ = _merged(FIRST, (2, 3), family=family)
    ours, theirs = Stream(student, BATCHES), Stream(teacher, BATCHES)
    for place in range(2):
        ours.advance(layers_of(student)[place])
    for place in range(4):
        theirs.advance(layers_of(teacher)[place])
    return ours, list(theirs.states), layers_of(student)[2], layout_of(student.config)


def _see_all(fit: ProjectionFit, ours: Stream, layer: nn.Module, targets: Sequence[Tensor]) -> None:
    for index, target in enumerate(targets):
        seen = observe(ours, layer, index)
        fit.see(index, seen.mlp, target, seen.output_BTD)


def _weighted_squares(target: Tensor, reached: Tensor) -> Tensor:
    """[B, T] what is lacking, as it counts."""
    return token_weights(target, None) * (target - reached).float().square().sum(-1)


def test_error_behind_a_norm_is_the_streams_where_the_norm_scales_nothing():
    ours, targets, layer, layout = _before_the_merge("gemma2")
    layer.get_parameter(f"{layout.mlp.norm_after}.weight").data.fill_(1 - layout.norm_offset)
    fit = ProjectionFit(layer, layout.mlp, ours, [0.1], HELD_OUT)
    seen = observe(ours, layer, 0)
    expected = _weighted_squares(targets[0], seen.output_BTD).sum().item()
    assert fit.error(0, seen.mlp, targets[0], seen.output_BTD) == pytest.approx(expected, rel=1e-4)


def test_output_that_the_norm_behind_it_all_but_silences_is_left_alone():
    ours, targets, layer, layout = _before_the_merge("gemma2")
    gain = layer.get_parameter(f"{layout.mlp.norm_after}.weight").data
    gain.fill_(1 - layout.norm_offset)
    gain[0] = 1e-4 - layout.norm_offset
    before = layer.get_submodule(layout.mlp.consumer).weight.detach().clone()
    fit = ProjectionFit(layer, layout.mlp, ours, [0.1], HELD_OUT)
    _see_all(fit, ours, layer, targets)
    fit.solve()
    moved = (layer.get_submodule(layout.mlp.consumer).weight != before).any(1)
    assert moved.tolist() == [False] + [True] * (len(moved) - 1)


def test_held_out_sequences_are_counted_through_all_batches():
    ours, targets, layer, layout = _before_the_merge()
    fit = ProjectionFit(layer, layout.mlp, ours, [0.1, 1.0], held_out=0.2)
    _see_all(fit, ours, layer, targets)
    squares = [
        _weighted_squares(target, observe(ours, layer, index).output_BTD) for index, target in enumerate(targets)
    ]
    held = sorted(held_out_sequences(16, 0.2))
    assert held == [2, 8, 13]  # the third, first and second of their batches
    assert fit._held_out.energy == pytest.approx(torch.cat(squares)[held].sum().item(), rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_weights_as_they_are_stored_never_raise_the_error(seed: int):
    # What is lacking is less than bfloat16 can say: rounded, a change for the better may be one for the worse.
    student = tiny_llama(dtype=torch.bfloat16)
    ours, layer, mlp = Stream(student, BATCHES), layers_of(student)[0], layout_of(student.config).mlp
    fit = ProjectionFit(layer, mlp, ours, [1e-4], HELD_OUT)
    generator = torch.Generator().manual_seed(seed)
    noise = [2e-4 * torch.randn(state.shape, generator=generator) for state in ours.states]
    targets = [observe(ours, layer, index).output_BTD.float() + each for index, each in enumerate(noise)]
    _see_all(fit, ours, layer, targets)
    weight = layer.get_submodule(mlp.consumer).weight
    before = weight.detach().double().clone()
    fit.solve()
    assert fit._fitted.error((weight.detach().double() - before).T) <= fit._fitted.energy
