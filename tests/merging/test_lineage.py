"""Plans and histories: what they derive, what they survive, what they refuse."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcprune.errors import InputError
from lcprune.merging.lineage import FORMAT, MergeHistory, MergeStep
from lcprune.merging.operators import Drop

DROP = {"class_path": "lcprune.merging.operators.Drop", "init_args": {"keep": "first"}}


def step(*group: int) -> MergeStep:
    return MergeStep(group, DROP, (1 / len(group),) * len(group))


@st.composite
def histories(draw: st.DrawFn) -> MergeHistory:
    """Any valid sequence of merges, with any figures."""
    teacher_depth = depth = draw(st.integers(1, 12))
    steps = []
    figures = st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=2)
    while depth > 1 and draw(st.booleans()):
        first = draw(st.integers(0, depth - 2))
        group = range(first, draw(st.integers(first + 1, depth - 1)) + 1)
        weights = draw(st.lists(st.integers(1, 9), min_size=len(group), max_size=len(group)))
        shares = tuple(weight / sum(weights) for weight in weights)
        global_step = draw(st.none() | st.integers(0, 9))
        steps.append(MergeStep(tuple(group), DROP, shares, draw(figures), global_step, draw(figures)))
        depth -= len(group) - 1
    return MergeHistory(teacher_depth, tuple(steps), draw(st.text(max_size=5)))


@given(histories())
def test_lineage_partitions_the_teachers_layers_in_order(history: MergeHistory):
    flat = [layer for members in history.lineage for layer in members]
    assert flat == list(range(history.teacher_depth))
    assert all(history.lineage)


@given(histories())
def test_depth_is_the_number_of_layers_of_the_lineage(history: MergeHistory):
    assert history.depth == len(history.lineage)


def test_lineage_of_the_docstrings_example():
    history = MergeHistory(6, (step(3, 4), step(1, 2, 3)))
    assert history.lineage == ((0,), (1, 2, 3, 4), (5,))


@given(histories())
def test_history_survives_json(history: MergeHistory):
    again = MergeHistory.from_json(history.to_json())
    assert again == history
    assert again.digest == history.digest


@given(histories())
def test_history_survives_plain_data(history: MergeHistory):
    assert MergeHistory.from_dict(history.to_dict()) == history


def test_history_survives_a_file(tmp_path: Path):
    history = MergeHistory(6, (step(3, 4),), "täacher")
    path = tmp_path / "history.json"
    path.write_text(history.to_json(), encoding="utf-8")
    assert MergeHistory.load(path) == history


def test_shares_left_out_of_a_plan_are_equal():
    data = {"format": FORMAT, "teacher_depth": 6, "steps": [{"group": [1, 2, 3, 4], "operator": DROP}]}
    assert MergeHistory.from_dict(data).steps[0].shares == (0.25,) * 4


def test_json_does_not_depend_on_the_order_of_keys():
    reverse = dict(reversed(DROP.items()))
    histories = [MergeHistory(6, (replace(step(3, 4), operator=operator),)) for operator in (DROP, reverse)]
    assert histories[0].to_json() == histories[1].to_json()


BASE = MergeStep((1, 2), DROP, (0.5, 0.5), {"seen": 0.25}, 3, {"loss": 2.0})


@pytest.mark.parametrize(
    "other",
    [
        MergeHistory(7, (BASE,), "teacher"),
        MergeHistory(6, (BASE,), "another"),
        MergeHistory(6, (), "teacher"),
        MergeHistory(6, (BASE, BASE), "teacher"),
        MergeHistory(6, (replace(BASE, group=(2, 3)),), "teacher"),
        MergeHistory(6, (replace(BASE, operator={"class_path": "Rdsc"}),), "teacher"),
        MergeHistory(6, (replace(BASE, operator={**DROP, "init_args": {"keep": "last"}}),), "teacher"),
        MergeHistory(6, (replace(BASE, shares=(0.25, 0.75)),), "teacher"),
        MergeHistory(6, (replace(BASE, scores={"seen": 0.5}),), "teacher"),
        MergeHistory(6, (replace(BASE, global_step=4),), "teacher"),
        MergeHistory(6, (replace(BASE, measured={"loss": 3.0}),), "teacher"),
    ],
)
def test_digest_changes_with_everything(other: MergeHistory):
    assert other.digest != MergeHistory(6, (BASE,), "teacher").digest


def test_digest_of_equal_histories_is_equal():
    assert MergeHistory(6, [BASE]).digest == MergeHistory(6).append(BASE).digest  # type: ignore[arg-type]


def test_append_and_extend_leave_the_history_as_it_was():
    history = MergeHistory(6)
    assert history.append(step(0, 1)).extend([step(0, 1), step(0, 1)]).depth == 3
    assert history.steps == ()


def test_history_goes_on_after_one_that_began_with_the_same_merges_and_after_no_other():
    whole = MergeHistory(6, (step(1, 2), step(0, 1)))
    assert whole.after(MergeHistory(6, (step(1, 2),))) == MergeHistory(5, (step(0, 1),))
    assert whole.after(MergeHistory(6)) == whole
    assert whole.after(MergeHistory(6, (step(3, 4),))) is None
    assert whole.after(MergeHistory(7)) is None
    assert whole.after(whole.append(step(0, 1))) is None


def test_append_refuses_a_step_past_the_depth_that_is_left():
    history = MergeHistory(6, (step(2, 3, 4),))
    with pytest.raises(InputError, match=r"group=\[3, 4\] reaches past the last layer 3"):
        history.append(step(3, 4))


@pytest.mark.parametrize("group", [(), (1,), (1, 3), (2, 1), (1, 1), (-1, 0), (1, 2, 4)])
def test_group_that_is_no_run_of_layers_is_refused(group: tuple[int, ...]):
    with pytest.raises(InputError, match=r"group=.*is not a run of two or more consecutive layers"):
        MergeStep(group, DROP, (1 / max(1, len(group)),) * len(group))


@pytest.mark.parametrize("shares", [(), (1.0,), (0.5, 0.6), (1.5, -0.5), (0.5, 0.25, 0.25), (float("inf"), 0)])
def test_shares_that_are_no_fractions_of_the_members_are_refused(shares: tuple[float, ...]):
    with pytest.raises(
        InputError, match=r"shares=.* of group \[1, 2\] must be 2 numbers, none negative, that sum to 1"
    ):
        MergeStep((1, 2), DROP, shares)


@pytest.mark.parametrize("operator", [{}, {"class_path": None}, {"init_args": {}}])
def test_operator_without_a_class_path_is_refused(operator: dict[str, object]):
    with pytest.raises(InputError, match="lacks its class_path"):
        MergeStep((1, 2), operator, (0.5, 0.5))


@pytest.mark.parametrize("depth", [0, -1, 10**9])
def test_teacher_without_layers_or_with_too_many_is_refused(depth: int):
    with pytest.raises(InputError, match=f"teacher_depth={depth} must lie between 1 and"):
        MergeHistory(depth)


def plan_with(**changes: object) -> dict[str, object]:
    """A plan of one step in which the named fields are replaced; of the step where it has such a field."""
    data = json.loads(MergeHistory(6, (BASE,)).to_json())
    for name, value in changes.items():
        (data["steps"][0] if name in data["steps"][0] else data)[name] = value
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "a JSON object, not list"),
        ("plan", "a JSON object, not str"),
        ({}, "format=None"),
        (plan_with(format=FORMAT + 1), f"format={FORMAT + 1} .* is not {FORMAT}"),
        (plan_with(teacher_depth="6"), "teacher_depth='6' must be a whole number"),
        (plan_with(teacher_depth=6.0), "teacher_depth=6.0 must be a whole number"),
        (plan_with(teacher_depth=True), "teacher_depth=True must be a whole number"),
        (plan_with(teacher_depth=2), r"group=\[1, 2\] reaches past the last layer 1"),
        (plan_with(teacher=None), "teacher=None must be the name"),
        (plan_with(steps={}), "steps={} must be a list"),
        (plan_with(steps=[[1, 2]]), r"steps\[0\] is a JSON object, not list"),
        (plan_with(steps=[{}]), r"steps\[0\].group=None must be a list"),
        (plan_with(steps=[{"gruop": [1, 2]}]), r"steps\[0\] has the unknown key 'gruop'; known are .*group"),
        (plan_with(group="1,2"), r"steps\[0\].group='1,2' must be a list of layer numbers"),
        (plan_with(group=[1, 2.0]), r"steps\[0\].group=\[1, 2.0\] must be a list of layer numbers"),
        (plan_with(group=[False, True]), r"steps\[0\].group=\[False, True\] must be a list of layer numbers"),
        (plan_with(group=[1, 3]), r"group=\[1, 3\] is not a run"),
        (plan_with(group=[], shares=None), r"must be a list of numbers|is not a run"),
        (plan_with(shares=0.5), r"steps\[0\].shares=0.5 must be a list of numbers"),
        (plan_with(shares=["a", "b"]), r"steps\[0\].shares=\['a', 'b'\] must be a list of numbers"),
        (plan_with(shares=[0.5, 0.6]), "sum to 1"),
        (plan_with(operator="Drop"), r"steps\[0\].operator='Drop' must be an object"),
        (plan_with(operator={}), "lacks its class_path"),
        (plan_with(scores=[1]), r"steps\[0\].scores=\[1\] must be an object"),
        (plan_with(measured=None), r"steps\[0\].measured=None must be an object"),
        (plan_with(global_step=1.5), r"steps\[0\].global_step=1.5 must be a whole number or null"),
    ],
)
def test_plan_that_does_not_fit_is_refused_by_the_field(data: Mapping[str, object], words: str):
    with pytest.raises(InputError, match=words):
        MergeHistory.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "{'format': 1}", "null and void"])
def test_text_that_is_not_json_is_refused(text: str):
    with pytest.raises(InputError, match="is not JSON"):
        MergeHistory.from_json(text)


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe\xff", b"{}"])
def test_file_that_holds_no_plan_is_named(content: bytes | None, tmp_path: Path):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json"):
        MergeHistory.load(path)


# JSON as Python reads it can hold NaN, which no comparison finds wrong.
def test_shares_that_are_not_numbers_are_refused():
    with pytest.raises(InputError, match="shares="):
        MergeStep((1, 2), DROP, (float("nan"), float("nan")))


@pytest.mark.parametrize("name", ["scores", "measured"])
def test_figures_of_other_libraries_become_plain_floats(name: str):
    step = MergeStep((1, 2), DROP, (0.5, 0.5), **{name: {"a": torch.tensor(0.5), "b": np.float32(3)}})  # type: ignore[arg-type]
    assert [(type(value), value) for value in getattr(step, name).values()] == [(float, 0.5), (float, 3.0)]
    history = MergeHistory(6, (step,))
    assert MergeHistory.from_json(history.sealed()) == history


# Their hash would be another's if they became floats.
def test_whole_numbers_of_a_sealed_history_stay_whole():
    history = MergeHistory(6, (MergeStep((1, 2), DROP, (0.5, 0.5), {"C": 3}),))
    assert '"C": 3\n' in history.sealed()
    assert MergeHistory.from_json(history.sealed()) == history


@pytest.mark.parametrize("figure", ["low", None, torch.ones(2), {}])
def test_figure_that_is_no_number_is_refused_where_the_step_is_made(figure: object):
    with pytest.raises(InputError, match=r"scores=.* of group \[1, 2\] must hold numbers by name"):
        MergeStep((1, 2), DROP, (0.5, 0.5), {"seen": figure})  # type: ignore[dict-item]


def test_history_is_saved_and_loaded_by_path_or_text(tmp_path: Path):
    history = MergeHistory(6, (MergeStep((1, 2), DROP, (0.5, 0.5)),), "somewhere")
    for path in (tmp_path / "new" / "plan.json", str(tmp_path / "plan.json")):
        history.save(path)
        assert MergeHistory.load(path) == MergeHistory.load(str(path)) == history
    with pytest.raises(InputError, match=f"path {tmp_path} is a folder: name a file in it"):
        history.save(tmp_path)
    with pytest.raises(InputError, match="path=3 must be text or a path"):
        MergeHistory.load(3)  # type: ignore[arg-type]


def test_layers_of_other_libraries_are_plain_numbers():
    step = MergeStep(np.array([1, 2]), DROP, np.array([0.5, 0.5]))  # type: ignore[arg-type]
    assert MergeHistory.from_json(MergeHistory(6, (step,)).to_json()).steps == (step,)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: MergeStep((1, 2), Drop("last"), (0.5, 0.5)),
            r"operator=Drop\(keep='last'\) of group \[1, 2\] must be",
        ),  # type: ignore[arg-type]
        (lambda: MergeStep((1, 2), "Drop", (0.5, 0.5)), "operator='Drop' of group .* must be plain data, such as"),  # type: ignore[arg-type]
        (lambda: MergeStep((1, 2), DROP, (0.5, 0.5), refit="RidgeRefit"), "refit='RidgeRefit' of group"),  # type: ignore[arg-type]
        (lambda: MergeStep((1, 2.5), DROP, (0.5, 0.5)), r"group=\(1, 2.5\) must be layer numbers"),  # type: ignore[arg-type]
        (lambda: MergeStep(3, DROP, (0.5, 0.5)), "group=3 must be layer numbers"),  # type: ignore[arg-type]
        (lambda: MergeHistory(6).append({"group": [1, 2]}), "is no MergeStep: write MergeStep"),  # type: ignore[arg-type]
        (lambda: MergeHistory(6, [(1, 2)]), r"steps: \(1, 2\) is no MergeStep"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_step_is_refused_in_one_sentence(call: Callable[[], object], words: str):
    with pytest.raises(InputError, match=words):
        call()


# Or a misspelt `steps` would read as a plan without merges.
def test_unknown_key_of_a_plan_is_refused():
    with pytest.raises(InputError, match="unknown key 'stesp'"):
        MergeHistory.from_dict({"format": FORMAT, "teacher_depth": 6, "stesp": []})


@pytest.mark.parametrize("name", ["scores", "measured"])
def test_figures_that_are_not_numbers_are_refused(name: str):
    with pytest.raises(InputError, match=rf"steps\[0\].{name}"):
        MergeHistory.from_dict(plan_with(**{name: {"seen": "low"}}))


def test_truth_value_is_no_global_step():
    with pytest.raises(InputError, match=r"steps\[0\].global_step=True"):
        MergeHistory.from_dict(plan_with(global_step=True))
