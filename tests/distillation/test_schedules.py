"""Milestones as literal numbers, what is refused, and what `Evenly` promises for any numbers."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcprune.distillation.schedules import AtSteps, Evenly, EveryNSteps, Facts, Schedule
from lcprune.errors import InputError


@pytest.mark.parametrize(
    ("schedule", "depth", "milestones"),
    [
        (AtSteps({120: 24, 20: 27}), 30, ((20, 27), (120, 24))),
        (AtSteps({0: 29}), 30, ((0, 29),)),
        (EveryNSteps(every=50, first=20, last=130), 30, ((20, 29), (70, 28), (120, 27))),
        (EveryNSteps(every=10, first=0, last=20, layers=2), 30, ((0, 28), (10, 26), (20, 24))),
        (EveryNSteps(every=10, first=5, last=5), 6, ((5, 5),)),
        (Evenly(24), 30, ((0, 24),)),
        (Evenly(24, merges=3, first=20, last=120), 30, ((20, 28), (70, 26), (120, 24))),
        (Evenly(24, merges=4, first=0, last=30), 30, ((0, 28), (10, 27), (20, 25), (30, 24))),
        (Evenly(25, merges=2, first=3, last=8), 30, ((3, 27), (8, 25))),
        (Evenly("75%"), 30, ((0, 23),)),
        (Evenly("75%", merges=2, first=3, last=8), 20, ((3, 17), (8, 15))),
        (Evenly("0.5%"), 30, ((0, 1),)),
    ],
)
def test_milestones_are_these_numbers(schedule: Schedule, depth: int, milestones: tuple[tuple[int, int], ...]):
    assert schedule.milestones(depth) == milestones
    assert schedule.target(depth) == milestones[-1][1]
    schedule.check(depth, 1000)


def test_due_names_the_depth_at_a_milestone_and_nothing_between():
    schedule = Evenly(24, merges=3, first=20, last=120)
    due = {step: schedule.due(Facts(step, begun=30, depth=30)) for step in range(200)}
    assert {step: depth for step, depth in due.items() if depth is not None} == {20: 28, 70: 26, 120: 24}


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (AtSteps({5: 0}), "target depth 0 must lie between 1 and 29"),
        (AtSteps({5: 30}), "target depth 30 must lie between 1 and 29"),
        (Evenly(30), "target depth 30 must lie between 1 and 29.*: change collapse.schedule.target_depth"),
        (Evenly(40, first=3), "target depth 40 must lie between 1 and 29"),
        (EveryNSteps(every=1, first=0, last=29), "target depth 0 must lie between 1 and 29"),
        (AtSteps({5: 20, 9: 20}), "depth 20 at step 9 does not go below 20"),
        (AtSteps({5: 20, 9: 21}), "depth 21 at step 9 does not go below 20"),
        (AtSteps({-1: 20}), r"steps \[-1\] must grow from 0 on"),
        (AtSteps({100: 20}), "step 100 lies at or behind trainer.max_steps=100"),
        (Evenly(24, merges=2, first=20, last=140), "step 140 lies at or behind trainer.max_steps=100"),
    ],
)
def test_check_refuses_in_one_sentence(schedule: Schedule, said: str):
    with pytest.raises(InputError, match=said):
        schedule.check(30, 100)


def test_check_takes_a_run_of_unknown_length():
    AtSteps({10**6: 20}).check(30, -1)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (AtSteps, {"depths": {}}),
        (EveryNSteps, {"every": 0, "first": 0, "last": 9}),
        (EveryNSteps, {"every": 1, "first": 9, "last": 8}),
        (EveryNSteps, {"every": 1, "last": 8, "first": -1}),
        (EveryNSteps, {"every": 1, "first": 0, "last": 8, "layers": 0}),
        (Evenly, {"target_depth": 0}),
        (Evenly, {"target_depth": 4, "merges": 0}),
        (Evenly, {"target_depth": 4, "first": -1}),
        (Evenly, {"target_depth": 4, "merges": 2}),
        (Evenly, {"target_depth": 4, "merges": 3, "first": 5, "last": 6}),
    ],
)
def test_construction_refuses_what_no_run_could_do(kind: type[Schedule], arguments: dict[str, object]):
    with pytest.raises(InputError, match=f"{[*arguments][-1]}="):
        kind(**arguments)


@st.composite
def evenly(draw: st.DrawFn) -> tuple[Evenly, int]:
    target, layers = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    merges, first = draw(st.integers(1, layers)), draw(st.integers(0, 500))
    last = first + draw(st.integers(merges - 1, 2000)) if merges > 1 else None
    return Evenly(target, merges=merges, first=first, last=last), target + layers


@given(evenly())
def test_evenly_spans_first_to_last_in_growing_steps_and_ends_at_the_target(example: tuple[Evenly, int]):
    schedule, depth = example
    steps, depths = zip(*schedule.milestones(depth), strict=True)
    assert len(steps) == schedule.merges
    assert steps[0] == schedule.first
    assert steps[-1] == (schedule.first if schedule.last is None else schedule.last)
    assert all(left < right for left, right in pairwise(steps))
    assert depths[-1] == schedule.target_depth
    gone = [before - after for before, after in zip((depth, *depths), depths, strict=False)]
    assert min(gone) >= 1
    assert max(gone) - min(gone) <= 1
    schedule.check(depth, steps[-1] + 1)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 50))
def test_evenly_with_more_merges_than_layers_takes_one_at_a_time(layers: int, more: int, first: int):
    schedule = Evenly(3, merges=layers + more, first=first, last=first + 100)
    milestones = schedule.milestones(3 + layers)
    assert [depth for _, depth in milestones] == list(range(2 + layers, 2, -1))
    assert milestones[-1][0] == first + 100
