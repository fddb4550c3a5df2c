"""Operators and refits as a plan names them: what can be named, and what is said of the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from lcprune.errors import InputError
from lcprune.merging import operators, refit, specs
from lcprune.merging.collapse import plan
from lcprune.merging.lineage import Lineage
from lcprune.merging.operators import Drop, Operator, WeightedAverage
from lcprune.merging.refit import Refit, RidgeRefit
from lcprune.merging.streams import Stream
from tests.builders import tiny_llama
from tests.merging.planning import plain


@dataclass(frozen=True)
class MyOperator(Operator):
    strength: float = 1.0

    merge = WeightedAverage.merge


@dataclass(frozen=True)
class MyRefit(Refit):
    strength: float = 1.0

    def refit(self, student: Stream, teacher: Stream, lineage: Lineage, merged: Sequence[int]) -> None:
        """Leaves the student as it is."""


class NoDataclass(Operator):
    merge = WeightedAverage.merge


class Box:
    @dataclass(frozen=True)
    class Nested(MyRefit):
        pass


def local_operator() -> Operator:
    @dataclass(frozen=True)
    class Local(MyOperator):
        pass

    return Local()


def local_refit() -> Refit:
    @dataclass(frozen=True)
    class Local(MyRefit):
        pass

    return Local()


@pytest.mark.parametrize(("family", "member"), [(Operator, MyOperator(0.5)), (Refit, MyRefit(0.5))])
def test_class_of_a_module_survives_its_spec(family: type, member: object):
    spec = specs.spec_of(family, member)
    assert spec == {"class_path": f"{__name__}.{type(member).__name__}", "init_args": {"strength": 0.5}}
    assert specs.from_spec(family, spec) == member


def test_bare_name_means_the_class_of_lcprune():
    assert operators.from_spec({"class_path": "Drop"}) == Drop()
    assert refit.from_spec({"class_path": "lcprune.RidgeRefit"}) == RidgeRefit()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (local_operator, r"operator local_operator\.<locals>\.Local is defined inside .*: define it at the top"),
        (local_refit, r"refit local_refit\.<locals>\.Local is defined inside .*: define it at the top"),
        (Box.Nested, r"refit Box\.Nested is defined inside .*: define it at the top"),
        (NoDataclass, r"operator NoDataclass is no dataclass, .*: put @dataclass\(frozen=True\) above the class"),
    ],
)
def test_class_that_no_plan_can_name_is_refused_before_anything_is_measured(
    make: Callable[[], Any], words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcprune.merging.calibration.collect", lambda *_: pytest.fail("measured"))
    member = make()
    given = {"operator" if isinstance(member, Operator) else "refit": member}
    with pytest.raises(InputError, match=words):
        plan(tiny_llama(), plain(), target_depth=4, **given)
    with pytest.raises(InputError, match=words):
        (operators if isinstance(member, Operator) else refit).spec_of(member)


@pytest.mark.parametrize("family", [Operator, Refit])
def test_module_that_is_not_imported_is_named_with_the_way_out(family: type):
    with pytest.raises(InputError, match=r"known are .*; if it is your own, import my_ops before this plan"):
        specs.from_spec(family, {"class_path": "my_ops.Mine"})


@pytest.mark.parametrize("class_path", ["Mine", "lcprune.Mine", "lcprune..Mine", "m.mk.<locals>.Mine", f"{__name__}.X"])
def test_nothing_is_said_of_importing_where_that_would_not_help(class_path: str):
    with pytest.raises(InputError, match=r"known are [\w, ]*\.$"):
        specs.from_spec(Operator, {"class_path": class_path})


def test_known_are_the_classes_that_a_bare_name_means():
    with pytest.raises(InputError, match=r"known are Concat, Drop, Rdsc, ReplaceWithLast, WeightedAverage\."):
        operators.from_spec({"class_path": "MyOperator"})
    with pytest.raises(InputError, match=r"known are MagnitudeCompensation, RidgeRefit\."):
        refit.from_spec({"class_path": "MyRefit"})


def test_operator_of_another_family_is_refused():
    with pytest.raises(InputError, match=r"'lcprune\.merging\.operators\.Drop' is not a refit"):
        refit.from_spec({"class_path": "lcprune.merging.operators.Drop"})


def test_class_that_a_plan_names_and_that_is_no_dataclass_is_refused():
    with pytest.raises(InputError, match="NoDataclass' is not an operator"):
        operators.from_spec({"class_path": f"{__name__}.NoDataclass"})
