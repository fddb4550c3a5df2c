"""The sums behind a ridge regression, against literal numbers and torch's own least squares."""

import pytest
import torch
from torch.nn.functional import normalize

from lcprune.merging.regression import Sums, best_strength, held_out_sequences, token_weights


def _sums(inputs: torch.Tensor, lacking: torch.Tensor, weights: torch.Tensor | None = None, parts: int = 1) -> Sums:
    weights = torch.ones(len(inputs)) if weights is None else weights
    sums = Sums.zeros(inputs.shape[1], lacking.shape[1], inputs.device)
    for z, e, w in zip(inputs.chunk(parts), lacking.chunk(parts), weights.chunk(parts), strict=True):
        sums.add(z, e, w)
    return sums


def _random(tokens: int = 40, inputs: int = 5, outputs: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, inputs, generator=generator), torch.randn(tokens, outputs, generator=generator)


def test_solution_is_the_literal_one_of_a_single_input():
    # z = (1, 2), e = (2, 5): sum zz = 5, sum ze = 12; lambda = 0.5 * 5: 12 / 7.5 = 1.6
    solution = _sums(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [5.0]])).solve(0.5)
    torch.testing.assert_close(solution, torch.tensor([[1.6]], dtype=torch.float64))


def test_solution_without_shrinking_is_least_squares():
    inputs, lacking = _random()
    expected = torch.linalg.lstsq(inputs.double(), lacking.double()).solution
    torch.testing.assert_close(_sums(inputs, lacking).solve(1e-12), expected)


def test_solution_with_weights_is_least_squares_of_scaled_rows():
    inputs, lacking = _random()
    weights = torch.rand(len(inputs), generator=torch.Generator().manual_seed(1)) + 0.1
    root = weights.sqrt()[:, None]
    expected = torch.linalg.lstsq((inputs * root).double(), (lacking * root).double()).solution
    torch.testing.assert_close(_sums(inputs, lacking, weights).solve(1e-12), expected, rtol=1e-5, atol=1e-6)


def test_solution_does_not_depend_on_how_tokens_are_split():
    inputs, lacking = _random()
    torch.testing.assert_close(_sums(inputs, lacking).solve(0.1), _sums(inputs, lacking, parts=4).solve(0.1))


def test_sums_do_not_take_the_precision_of_a_run():
    plainly = _sums(*_random())
    with torch.autocast("cpu", torch.bfloat16):
        assert _sums(*_random()).error(plainly.solve(0.1)) == plainly.error(plainly.solve(0.1))


def test_two_sets_of_tokens_add_up():
    inputs, lacking = _random()
    both = _sums(inputs[:10], lacking[:10]) + _sums(inputs[10:], lacking[10:])
    torch.testing.assert_close(both.solve(0.1), _sums(inputs, lacking).solve(0.1))


def test_error_is_the_sum_of_weighted_squares():
    inputs, lacking = _random()
    weights, change = torch.linspace(0.1, 2, len(inputs)), torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    expected = (weights[:, None] * (lacking - inputs @ change).square()).sum().item()
    assert _sums(inputs, lacking, weights).error(change.double()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("strength", [1e-9, 0.01, 1.0, 100.0])
def test_solution_never_raises_the_error(strength: float):
    sums = _sums(*_random())
    assert sums.error(sums.solve(strength)) <= sums.energy


def test_solution_shrinks_to_nothing_as_the_strength_grows():
    sums = _sums(*_random())
    lengths = [float(sums.solve(strength).norm()) for strength in (0.01, 1.0, 100.0, 1e9)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 1e-6


def test_solution_is_zero_where_nothing_is_lacking():
    inputs, _ = _random()
    assert not _sums(inputs, torch.zeros(len(inputs), 3)).solve(0.1).any()


@pytest.mark.parametrize("broken", [0, 1])
def test_solution_is_zero_where_a_token_is_no_number(broken: int):
    tokens = _random()
    tokens[broken][3, 1] = torch.inf
    assert not _sums(*tokens).solve(0.1).any()


def test_solution_exists_for_fewer_tokens_than_inputs():
    inputs, lacking = _random(tokens=2)
    solution = _sums(inputs, lacking).solve(1e-14)
    torch.testing.assert_close((inputs.double() @ solution).float(), lacking, rtol=1e-3, atol=1e-3)


def test_best_strength_is_weak_where_the_relation_is_true_and_strong_where_it_is_chance():
    inputs, noise = _random(tokens=24)
    truth = inputs @ torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    strengths = [1e-4, 1.0, 1e4]
    true = [_sums(inputs[part], truth[part]) for part in (slice(0, 16), slice(16, 24))]
    chance = [_sums(inputs[part], noise[part]) for part in (slice(0, 16), slice(16, 24))]
    strength, error = best_strength(*true, strengths)
    assert strength == 1e-4
    assert error == true[1].error(true[0].solve(1e-4)) < 0.01 * true[1].energy
    assert best_strength(*chance, strengths)[0] > 1e-4


def test_token_weights_are_literal():
    # lengths 1, 2, 4, 20: the (lower) median is 2
    state = torch.tensor([[[1.0, 0], [2, 0], [4, 0], [20, 0]]])
    torch.testing.assert_close(token_weights(state, None), torch.tensor([[1.0, 1.0, 0.5, 0.1]]))


def test_tokens_that_are_all_masked_weigh_nothing():
    weights = token_weights(torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(weights, torch.zeros(2, 3))


def test_masked_tokens_weigh_nothing_and_move_no_median():
    state = torch.tensor([[[1.0, 0], [2, 0], [4, 0], [20, 0]]])
    mask = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(token_weights(state, mask), torch.tensor([[1.0, 1.0, 0.5, 0.0]]))


def test_a_massive_activation_that_is_gone_is_made_anew():
    generator = torch.Generator().manual_seed(0)
    wanted = normalize(torch.randn(16, 128, 16, generator=generator), dim=-1)
    lacking, inputs = 0.3 * wanted, torch.randn(16, 128, 512, generator=generator)
    wanted[:, 0] = lacking[:, 0] = 130 * wanted[0, 0]  # the first token of every sequence, which looks the same in each
    inputs[..., 0], inputs[:, 0] = 0.0, 0.0
    inputs[:, 0, 0] = 512**0.5  # ... and has a channel of its own, as long as the others' inputs
    sums = Sums.zeros(512, 16, wanted.device)
    sums.add(inputs.flatten(0, 1), lacking.flatten(0, 1), token_weights(wanted, None).flatten())
    regained = inputs[0, 0].double() @ sums.solve(0.03)
    assert regained.norm() > 32  # with the square of the weights it is 1


@pytest.mark.parametrize(("count", "fraction", "expected"), [(8, 0.25, {2, 6}), (2, 0.1, {1}), (3, 0.99, {0, 2})])
def test_held_out_sequences_are_spread_and_never_all(count: int, fraction: float, expected: set[int]):
    assert held_out_sequences(count, fraction) == expected
