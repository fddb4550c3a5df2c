"""Figures, errors and what was retained: literal numbers; the JSON says what the report expects."""

import json
from math import sqrt

import pytest

from lcprune.delivery.choices import Answers
from lcprune.delivery.evaluate import Evaluation, ModelEvaluation, TaskFigures, of_answers, stderr
from lcprune.delivery.figures import ModelFigures


def _model(name: str, perplexity: float | None, tasks: dict[str, TaskFigures]) -> ModelEvaluation:
    rates = {"prefill": 2000.0, "decode": 20.0}
    return ModelEvaluation(name, ModelFigures(4, 1000, 4000), perplexity, tasks, 0.25, rates, 512)


RIGHT = Answers((True, True, False, True), (True, False, False, True))
LESS = Answers((True, False, True, False), (False, False, False, True))
PAIR = Evaluation(
    _model("short", 30.0, {"t": of_answers(LESS)}),
    _model("long", 20.0, {"t": of_answers(RIGHT)}),
    {"top1": 0.5, "kl": 0.1},
)


def test_task_figures_are_means_and_a_binomial_error():
    task = of_answers(RIGHT)
    assert task.metrics == {"acc": 0.75, "acc_norm": 0.5}
    assert task.to_dict()["rows"] == 4
    assert task.stderr == pytest.approx(sqrt(0.75 * 0.25 / 3))


def test_stderr_of_one_question_is_not_known():
    assert stderr([1.0]) is None


def test_retained_is_student_over_teacher():
    assert PAIR.retained == {"t": pytest.approx(2 / 3), "perplexity_ratio": 1.5}


def test_paired_error_is_that_of_the_differences():
    pair = PAIR.paired["t"]  # 0, -1, 1, -1
    assert pair.difference == -0.25
    assert pair.stderr == pytest.approx(sqrt((0.0625 + 0.5625 + 1.5625 + 0.5625) / 3) / 2)
    assert (pair.teacher_only, pair.student_only) == (2, 1)


def test_task_on_which_the_teacher_scores_nothing_is_not_compared():
    nothing = of_answers(Answers((False, False), (False, False)))
    assert Evaluation(_model("s", 1.0, {"t": nothing}), _model("t", 1.0, {"t": nothing})).retained == {
        "perplexity_ratio": 1.0
    }


def test_what_is_better_lower_is_a_ratio_and_not_retained():
    theirs, mine = (TaskFigures({"word_perplexity": value}, 10, lower_is_better=True) for value in (20.0, 26.0))
    pair = Evaluation(_model("s", None, {"w": mine}), _model("t", None, {"w": theirs}))
    assert pair.retained == {}
    assert pair.ratios == {"w": 1.3}
    assert json.loads(pair.to_json())["ratios"] == {"w": 1.3}


def test_task_known_only_as_a_whole_is_retained_without_a_paired_error():
    whole = TaskFigures({"exact_match": 0.5}, 10)
    pair = Evaluation(_model("s", None, {"t": whole}), _model("t", None, {"t": whole}))
    assert pair.retained == {"t": 1.0}
    assert pair.paired == {}


def test_json_has_the_names_that_the_report_reads():
    content = json.loads(PAIR.to_json())
    assert list(content["models"]) == ["teacher", "student"]
    assert {
        "name",
        "layers",
        "parameters",
        "bytes",
        "perplexity",
        "tasks",
        "repetition",
        "tokens_per_second",
        "cache_bytes_per_token",
    } <= content["models"]["student"].keys()
    assert content["models"]["student"]["tasks"]["t"].keys() == {"acc", "acc_norm", "rows", "stderr"}
    assert content["models"]["student"]["repetition"] == {"rep-4": 0.25}
    assert content["models"]["student"]["tokens_per_second"] == {"prefill": 2000.0, "decode": 20.0}
    assert content["agreement"] == {"top1": 0.5, "kl": 0.1}
    assert {"retained", "settings", "versions"} <= content.keys()


def test_json_of_a_model_alone_compares_with_nothing():
    content = json.loads(Evaluation(_model("one", 30.0, {})).to_json())
    assert list(content["models"]) == ["student"]
    assert content["agreement"] == content["retained"] == content["paired"] == {}


def test_json_says_null_for_what_is_no_number():
    content = json.loads(Evaluation(_model("one", float("inf"), {})).to_json())
    assert content["models"]["student"]["perplexity"] is None
