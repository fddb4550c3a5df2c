"""What an optimizer forgets at a merge and what it keeps; the learning rate's curve as literal numbers."""

import math
from collections.abc import Callable

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lcprune.distillation.optim import Rewarming, RewarmingCosine, RewarmingWSD, carry_over, check, forget_gradients
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeStep
from tests import builders

STEP = MergeStep((1, 2, 3), {"class_path": "Rdsc"}, (0.4, 0.3, 0.3))
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "adamw_8bit": lambda p: AdamW8bit(p, lr=0.01, min_8bit_size=256),  # packs matrices, not norms
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


def trained(make: Callable[..., Optimizer], batch: dict[str, Tensor]) -> tuple[PreTrainedModel, Optimizer]:
    """A model after two steps, with two groups: named decoder layers, and the rest."""
    model = builders.tiny_llama()
    named = list(model.named_parameters())
    optimizer = make(
        [
            {"params": [pair for pair in named if ".layers." in pair[0]]},
            {"params": [pair for pair in named if ".layers." not in pair[0]]},
        ]
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model, optimizer


def test_adagrad_that_starts_above_zero_is_refused():
    check(torch.optim.Adagrad([Parameter(torch.ones(1))]))
    with pytest.raises(InputError, match=r"initial_accumulator_value=0\.1 of Adagrad"):
        check(torch.optim.Adagrad([Parameter(torch.ones(1))], initial_accumulator_value=0.1))


def test_carry_over_removes_exactly_the_absorbed(batch: dict[str, Tensor]):
    model, optimizer = trained(OPTIMIZERS["adamw"], batch)
    groups, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    before = dict(model.named_parameters())
    absorbed = {name: parameter for name, parameter in before.items() if ".layers.2." in name or ".layers.3." in name}
    assert len(absorbed) == 18
    outcome = surgery.apply(model, STEP)
    carry_over(optimizer, outcome)
    staying = [name for name in before if name not in absorbed]
    assert [now is then for now, then in zip(optimizer.param_groups, groups, strict=True)] == [True, True]
    assert all(group["params"] is params for group, params in zip(groups, lists, strict=True))
    assert [name for group in groups for name in group["param_names"]] == [
        name for part in (True, False) for name in staying if (".layers." in name) == part
    ]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    assert held == {id(before[name]) for name in staying} == {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in optimizer.state} == held


def test_carry_over_zeroes_the_merged_state_and_no_other(batch: dict[str, Tensor]):
    model, optimizer = trained(OPTIMIZERS["adamw"], batch)
    merged = set(model.model.layers[1].parameters())
    kept = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items() if p not in merged}
    outcome = surgery.apply(model, STEP)
    carry_over(optimizer, outcome)
    assert set(outcome.merged) == merged
    for parameter in merged:
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
        assert not any(value.any() for value in optimizer.state[parameter].values())
        assert parameter.grad is None
    for parameter in model.parameters():
        if parameter not in merged:
            assert all(value.equal(kept[parameter][name]) for name, value in optimizer.state[parameter].items())
            assert optimizer.state[parameter]["step"] == 2


NOT_ZERO = {"nadam": torch.optim.NAdam, "rprop": torch.optim.Rprop, "asgd": torch.optim.ASGD}


@pytest.mark.parametrize("kind", NOT_ZERO.values(), ids=NOT_ZERO)
def test_optimizer_whose_state_does_not_start_at_zero_is_refused(kind: type[torch.optim.Optimizer]):
    with pytest.raises(InputError, match=f"{kind.__name__}.*AdamW"):
        check(kind([Parameter(torch.zeros(2))], lr=0.1))  # type: ignore[call-arg]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in NOT_ZERO])
def test_step_after_a_merge_is_a_fresh_optimizers(name: str, batch: dict[str, Tensor]):
    model, optimizer = trained(OPTIMIZERS[name], batch)
    outcome = surgery.apply(model, STEP)
    carry_over(optimizer, outcome)
    fresh = [Parameter(parameter.detach().clone()) for parameter in outcome.merged]
    model(**batch).loss.backward()
    for parameter, twin in zip(outcome.merged, fresh, strict=True):
        assert parameter.grad is not None
        twin.grad = parameter.grad.clone()
    start = [parameter.detach().clone() for parameter in outcome.merged]
    optimizer.step()
    OPTIMIZERS[name](fresh).step()
    for parameter, twin, before in zip(outcome.merged, fresh, start, strict=True):
        assert torch.isfinite(parameter).all()
        assert not parameter.equal(before)
        torch.testing.assert_close(parameter.detach(), twin.detach(), rtol=0, atol=0)


def test_carried_over_state_survives_a_checkpoint(batch: dict[str, Tensor]):
    model, optimizer = trained(OPTIMIZERS["adamw"], batch)
    carry_over(optimizer, surgery.apply(model, STEP))
    _, other = trained(OPTIMIZERS["adamw"], batch)
    other_model = builders.tiny_llama()
    surgery.apply(other_model, STEP)
    named = list(other_model.named_parameters())
    other = torch.optim.AdamW(
        [{"params": [p for n, p in named if (".layers." in n) == part]} for part in (True, False)]
    )
    other.load_state_dict(optimizer.state_dict())
    saved = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    loaded = [other.state[p] for group in other.param_groups for p in group["params"]]
    assert len(saved) == len(loaded) == 4 * 9 + 2
    for left, right in zip(saved, loaded, strict=True):
        assert all(left[name].equal(right[name]) for name in left)


def test_carry_over_before_the_first_step_needs_no_state():
    model = builders.tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    carry_over(optimizer, surgery.apply(model, STEP))
    assert len(optimizer.param_groups[0]["params"]) == 4 * 9 + 2
    assert not optimizer.state


def test_forget_gradients_leaves_none(batch: dict[str, Tensor]):
    model = builders.tiny_llama()
    model(**batch).loss.backward()
    forget_gradients(list(model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def made(kind: type[Rewarming] = RewarmingCosine, **settings: object) -> tuple[Optimizer, Rewarming]:
    first, second = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 20.0}], lr=1.0)
    return optimizer, kind(optimizer, **settings)  # type: ignore[arg-type]


def rates(optimizer: Optimizer, scheduler: Rewarming, steps: int, merges: tuple[int, ...] = ()) -> list[float]:
    """The first group's rate at every optimizer step; a merge happens after so many steps."""
    seen = []
    for step in range(steps):
        if step in merges:
            scheduler.rewarm()
        seen.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(20 * seen[-1])
        assert scheduler.get_last_lr()[0] == seen[-1]
        optimizer.step()
        scheduler.step()
    return seen


def cosine(done: float, floor: float = 0.1) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def test_rewarming_cosine_is_this_curve():
    optimizer, scheduler = made(warmup_steps=3, rewarm_steps=1, floor=0.1, total_steps=11)
    expected = [0.25, 0.5, 0.75, 1.0, *(cosine(k / 8) for k in range(1, 9)), 0.1, 0.1]
    assert expected[7] == pytest.approx(0.55)
    assert rates(optimizer, scheduler, 14) == pytest.approx(expected)


def test_rewarming_wsd_is_this_curve():
    optimizer, scheduler = made(RewarmingWSD, warmup_steps=3, rewarm_steps=1, decay=0.4, floor=0.2, total_steps=10)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.6, 0.43431457505076194, 0.30717967697244912, 0.2, 0.2]
    assert rates(optimizer, scheduler, 12) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("decay", "expected"), [(0.0, [1.0, 1.0, 1.0, 1.0]), (1.0, [1.0, 0.5, 0.29289321881345254, 0.1339745962155614])]
)
def test_decay_may_take_nothing_or_the_whole_curve(decay: float, expected: list[float]):
    assert rates(*made(RewarmingWSD, warmup_steps=0, decay=decay, total_steps=4), 4) == pytest.approx(expected)


def test_warm_up_that_leaves_no_room_shortens_the_decay():
    optimizer, scheduler = made(RewarmingWSD, warmup_steps=3, decay=1.0, total_steps=5)
    assert rates(optimizer, scheduler, 6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1 - math.sqrt(0.5), 0.0])


def test_rewarm_of_wsd_climbs_back_in_the_stable_part_and_in_the_decay():
    optimizer, scheduler = made(RewarmingWSD, warmup_steps=0, rewarm_steps=1, decay=0.5, total_steps=8)
    expected = [1, 1, 0.5, 1, 1, 0.25, 0.29289321881345254, 0.1339745962155614]
    assert rates(optimizer, scheduler, 8, (2, 5)) == pytest.approx(expected)


def test_stable_part_does_not_depend_on_where_the_end_is():
    long, short = (made(RewarmingWSD, warmup_steps=2, decay=0.2, total_steps=steps) for steps in (100, 20))
    assert rates(*long, 16) == rates(*short, 16)


def test_rewarm_climbs_back_to_the_curve_after_every_merge():
    optimizer, scheduler = made(warmup_steps=0, rewarm_steps=3, floor=0.0, total_steps=16)
    curve = [cosine(k / 16, 0.0) for k in range(16)]
    factors = [1, 1, 0.25, 0.5, 0.75, 1, 1, 1, 0.25, 0.5, 0.25, 0.5, 0.75, 1, 1, 1]
    expected = [factor * height for factor, height in zip(factors, curve, strict=True)]
    assert rates(optimizer, scheduler, 16, (2, 8, 10)) == pytest.approx(expected)


def test_rewarm_of_no_steps_changes_nothing():
    plain, rewarmed = (made(warmup_steps=2, rewarm_steps=0, total_steps=9) for _ in range(2))
    assert rates(*plain, 9) == rates(*rewarmed, 9, (3, 6))


KINDS = pytest.mark.parametrize("kind", [RewarmingCosine, RewarmingWSD])


@KINDS
def test_rate_without_a_known_end_stays_at_the_peak(kind: type[Rewarming]):
    assert rates(*made(kind, warmup_steps=1, rewarm_steps=1), 5) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_total_steps_given_by_the_user_are_not_overwritten():
    _, scheduler = made(warmup_steps=0, total_steps=4)
    scheduler.set_total_steps(100)
    assert scheduler.curve.total_steps == 4
    _, scheduler = made(warmup_steps=0)
    scheduler.set_total_steps(100)
    assert scheduler.curve.total_steps == 100


@KINDS
@pytest.mark.parametrize("stop", [3, 4, 5, 9, 12])
def test_state_dict_reproduces_all_later_rates(stop: int, kind: type[Rewarming]):
    settings = {"warmup_steps": 2, "rewarm_steps": 3}
    optimizer, scheduler = made(kind, **settings)
    scheduler.set_total_steps(14)
    whole = rates(optimizer, scheduler, 14, (4, 8))
    optimizer, scheduler = made(kind, **settings)
    scheduler.set_total_steps(14)
    rates(optimizer, scheduler, stop, (4, 8))
    saved = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    assert all(
        isinstance(value, int | float | bool | list | None) for value in saved["scheduler"]["lr_lambdas"][0].values()
    )
    resumed_optimizer, resumed = made(kind, **settings)
    resumed.set_total_steps(99)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["scheduler"])
    later = tuple(merge - stop for merge in (4, 8) if merge >= stop)
    assert rates(resumed_optimizer, resumed, 14 - stop, later) == whole[stop:]


def test_peak_set_since_the_checkpoint_is_the_initial_rate_of_every_group():
    _, was = made(warmup_steps=2, total_steps=10)
    optimizer, scheduler = made(warmup_steps=2, total_steps=10)
    was.base_lrs = [0.5, 10.0]
    for group, peak in zip(optimizer.param_groups, was.base_lrs, strict=True):
        group["initial_lr"] = peak  # as the optimizer's own state leaves it
    scheduler.load_state_dict(was.state_dict())
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1.0, 20.0]


@pytest.mark.parametrize(
    "wrong", [{"warmup_steps": -1}, {"rewarm_steps": -1}, {"floor": 1.5}, {"floor": -0.1}, {"total_steps": 0}]
)
@KINDS
def test_rewarming_refuses_impossible_numbers(wrong: dict[str, float], kind: type[Rewarming]):
    with pytest.raises(InputError, match=f"{kind.__name__}.*{next(iter(wrong))}={next(iter(wrong.values()))}"):
        made(kind, **wrong)


def test_rewarming_names_every_mistake_at_once():
    with pytest.raises(InputError, match=r"RewarmingWSD: floor=2 must .*; decay=1.5 must .*"):
        made(RewarmingWSD, decay=1.5, floor=2)
