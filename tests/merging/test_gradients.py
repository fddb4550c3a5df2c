"""Scores by weights and gradients, against a plain backward pass of the whole model."""

import pytest
import torch
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import gradients
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.criteria import Criterion
from lcprune.merging.gradients import Magnitude, Taylor
from lcprune.merging.operators import Drop
from lcprune.merging.planners import OneShotRanking
from lcprune.merging.surgery import second_view
from tests.builders import ALL_FAMILIES, FAMILIES, Family, tiny_llama, token_batches
from tests.merging.planning import groups_of, layers_of, plain

CRITERIA: tuple[Criterion, ...] = (Magnitude(), Magnitude(power=2.0), Taylor())


def by_backward(model: PreTrainedModel, batches: list[Batch]) -> list[float]:
    """All gradients at once, from transformers' own loss; the gradients are taken away again."""
    ids, labels = (torch.cat([batch.get(n, batch["input_ids"]) for batch in batches]) for n in ("input_ids", "labels"))
    # transformers averages over what is scored, labels shifted by one.
    model(ids, labels=labels, use_cache=False).loss.backward()
    scores = [
        sum((p.detach() * p.grad).abs().sum().item() for p in layer.parameters() if p.dim() > 1 and p.grad is not None)
        for layer in layers_of(model)
    ]
    model.zero_grad()
    return scores


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_taylor_is_what_a_backward_pass_through_the_whole_model_gives(family: Family):
    model = tiny_llama(4, model_type=family)
    expected = by_backward(model, plain())
    assert Taylor().score(Calibration(model, plain())) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_taylor_scores_the_labels_given(tied: bool):
    model = tiny_llama(tied=tied)
    generator = torch.Generator().manual_seed(0)
    batches: list[Batch] = [
        {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)}
        for ids in token_batches()
    ]
    assert Taylor().score(Calibration(model, batches)) == pytest.approx(by_backward(model, batches), rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 7])
def test_taylor_does_not_depend_on_how_many_logits_exist_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama()
    expected = Taylor().score(Calibration(model, plain()))
    monkeypatch.setattr(gradients, "HEAD_CHUNK", chunk)
    assert Taylor().score(Calibration(model, plain())) == pytest.approx(expected, rel=1e-5)


def test_taylor_does_not_depend_on_how_sequences_are_batched():
    model = tiny_llama()
    together: list[Batch] = [{"input_ids": torch.cat(token_batches())}]
    assert Taylor().score(Calibration(model, together)) == pytest.approx(
        Taylor().score(Calibration(model, plain())), rel=1e-5
    )


def test_taylor_in_bfloat16_is_near_that_in_float32():
    exact, rough = (Taylor().score(Calibration(tiny_llama(dtype=d), plain())) for d in (torch.float32, torch.bfloat16))
    assert rough == pytest.approx(exact, rel=0.1)


def test_taylor_of_text_that_scores_nothing_is_zero():
    batches: list[Batch] = [{**batch, "labels": torch.full((2, 16), -100)} for batch in plain()]
    assert Taylor().score(Calibration(tiny_llama(), batches)) == (0.0,) * 6


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_taylor_works_where_the_caller_has_switched_gradients_off(switch: type):
    model = tiny_llama()
    expected = Taylor().score(Calibration(model, plain()))
    with switch():
        assert Taylor().score(Calibration(model, plain())) == expected
        assert not torch.is_grad_enabled()


def test_taylor_of_a_student_that_shares_its_tensors_is_that_of_the_teacher():
    teacher = tiny_llama()
    student = second_view(teacher).requires_grad_(False)
    expected = Taylor().score(Calibration(teacher, plain()))
    assert Taylor().score(Calibration(student, plain())) == expected


@pytest.mark.parametrize("fails", [False, True])
def test_taylor_leaves_flags_modes_and_gradients_as_they_were(fails: bool, monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama().train()
    layers_of(model)[1].requires_grad_(False)
    layers_of(model)[2].eval()
    given = [torch.full_like(p, 0.5) if p.requires_grad else None for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), given, strict=True):
        parameter.grad = gradient
    flags = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    values = [p.detach().clone() for p in model.parameters()]
    identities = [id(p) for p in model.parameters()]
    if fails:
        whole = layers_of(model)[1].mlp.forward
        # The stream is recorded without gradients, and whole.
        monkeypatch.setattr(
            layers_of(model)[1].mlp, "forward", lambda x: _fail() if torch.is_grad_enabled() else whole(x)
        )
        with pytest.raises(ArithmeticError):
            Taylor().score(Calibration(model, plain()))
    else:
        Taylor().score(Calibration(model, plain()))
    assert [id(p) for p in model.parameters()] == identities
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is g for p, g in zip(model.parameters(), given, strict=True))
    assert all(g is None or bool((g == 0.5).all()) for g in given)
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))


def _fail() -> None:
    raise ArithmeticError


def test_magnitude_is_the_sum_of_absolute_entries_of_all_matrices():
    model = tiny_llama()
    matrices = [p.detach() for p in layers_of(model)[2].parameters() if p.dim() > 1]
    assert len(matrices) == 7
    calibration = Calibration(model, plain())
    assert Magnitude().score(calibration)[2] == pytest.approx(sum(m.abs().sum().item() for m in matrices))
    assert Magnitude(2.0).score(calibration)[2] == pytest.approx(sum(m.square().sum().item() for m in matrices))


@pytest.mark.parametrize("power", [0, -1, float("nan")])
def test_magnitude_refuses_a_power_that_means_nothing(power: float):
    with pytest.raises(InputError, match=f"power={power} of Magnitude must be above 0"):
        Magnitude(power)


@pytest.mark.parametrize(
    ("family", "silent"),
    [*((family, 2) for family in (*FAMILIES, "mixtral", "qwen3_moe", "gpt2")), ("llama", 0), ("llama", 5)],
)
@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_layer_of_zeros_scores_lowest(criterion: Criterion, family: Family, silent: int):
    model = tiny_llama(model_type=family)
    with torch.no_grad():
        for parameter in layers_of(model)[silent].parameters():
            parameter.zero_()
    scores = criterion.score(Calibration(model, plain()))
    assert len(scores) == 6
    assert all(scores[silent] < score for layer, score in enumerate(scores) if layer != silent)


def test_one_shot_ranking_with_taylor_takes_the_lowest_between_the_spared():
    model = tiny_llama(n_layers=8)
    scores = Taylor().score(Calibration(model, plain()))
    lowest = min(range(4, 6), key=scores.__getitem__)
    planner = OneShotRanking(Taylor(), spare_first=4, spare_last=2)
    steps = planner.plan(Calibration(model, plain()), Drop(), 7)
    assert groups_of(steps) == [(lowest - 1, lowest)]
