"""What a long computation says about how far it has come."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel

from lcprune.merging.calibration import Calibration
from lcprune.merging.criteria import OutputSimilarity, TrialPerplexity, score_all
from lcprune.merging.operators import Drop
from lcprune.merging.planners import OneShotRanking, Planner, ThresholdPlanner
from lcprune.merging.progress import reporting, track
from tests.builders import tiny_llama, token_batches

Report = tuple[str, int, int | None]


def heard(work: Callable[[], object]) -> list[Report]:
    reports: list[Report] = []
    with reporting(lambda *report: reports.append(report)):
        work()
    return reports


def calibration(model: PreTrainedModel | None = None) -> Calibration:
    return Calibration(model or tiny_llama(), [{"input_ids": ids} for ids in token_batches()])


def test_items_come_unchanged_with_and_without_a_reporter():
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    with reporting(lambda *report: None):
        assert list(track("abc", "letters")) == ["a", "b", "c"]


def test_every_finished_item_is_reported():
    assert heard(lambda: list(track("ab", "letters"))) == [("letters", 0, 2), ("letters", 1, 2), ("letters", 2, 2)]


def test_a_number_that_is_not_known_is_none_until_the_end():
    assert heard(lambda: list(track(iter("a"), "letters"))) == [
        ("letters", 0, None),
        ("letters", 1, None),
        ("letters", 1, 1),
    ]


def test_a_loop_that_is_left_early_reports_its_end():
    def leave() -> None:
        for letter in track("abc", "letters"):
            if letter == "b":
                break

    assert heard(leave) == [("letters", 0, 3), ("letters", 1, 3), ("letters", 1, 1)]


def test_nothing_is_reported_outside_of_the_block():
    reports = heard(lambda: None)
    list(track("abc", "letters"))
    assert reports == []


def test_inner_reporter_goes_and_the_outer_comes_back():
    outer = heard(lambda: (heard(lambda: list(track("a", "inner"))), list(track("b", "outer"))))
    assert {what for what, _, _ in outer} == {"outer"}


@pytest.mark.parametrize("planner", [OneShotRanking(TrialPerplexity()), ThresholdPlanner(2, threshold=-1)], ids=repr)
def test_planning_reports_stages_that_begin_at_none_and_all_end(planner: Planner):
    reports = heard(lambda: planner.plan(calibration(), Drop(), 4))
    for what in {what for what, _, _ in reports}:
        stage = [report for report in reports if report[0] == what]
        assert stage[0][1] == 0
        assert stage[-1][1] == stage[-1][2]


@pytest.mark.parametrize("threshold", [-1.0, 1.0])
def test_search_announces_at_least_as_many_attempts_as_it_makes(threshold: float):
    reports = heard(lambda: ThresholdPlanner(2, lowest=0, threshold=threshold).plan(calibration(), Drop(), 1))
    attempts = [report for report in reports if report[0] == "trying merges"]
    most = attempts[0][2]
    assert most is not None
    assert all(done <= most for _, done, _ in attempts)
    assert (attempts[-1][1] == most) == (threshold == 1.0)  # nothing accepted: every base is tried


def test_criteria_that_try_layers_out_share_one_sweep(monkeypatch: pytest.MonkeyPatch):
    criteria = (OutputSimilarity(), TrialPerplexity())
    alone = tuple(criterion.score(calibration()) for criterion in criteria)
    together: list[tuple[tuple[float, ...], ...]] = []
    reports = heard(lambda: together.append(score_all(criteria, calibration())))
    assert together == [alone]
    assert [done for what, done, _ in reports if what.startswith("trying")] == list(range(7))


def test_scoring_is_the_same_with_a_reporter():
    quiet = TrialPerplexity().score(calibration())
    loud: list[tuple[float, ...]] = []
    heard(lambda: loud.append(TrialPerplexity().score(calibration())))
    assert loud == [quiet]
    assert torch.tensor(quiet).isfinite().all()


def _countdown() -> Iterator[int]:
    yield from (3, 2, 1)


def test_total_that_is_given_counts():
    assert heard(lambda: list(track(_countdown(), "seconds", total=3)))[0] == ("seconds", 0, 3)
