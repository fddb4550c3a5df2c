"""lm-eval answers like our own files do; without it, or for a task it does not know, one sentence."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lcprune.delivery import choices, evaluate, harness
from lcprune.delivery.harness import Results
from lcprune.errors import InputError
from tests.builders import tiny_llama

ROWS = [
    {
        "context": f"Question {number}: what now?\nAnswer:",
        "choices": ["that", "this and more of it"],
        "label": number % 2,
    }
    for number in range(8)
]
TASK = """\
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GROUP = "group: pair\ntask: [ours]\naggregate_metric_list: [{metric: acc}]\n"


def test_harness_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"--tasks piqa needs lm-eval.*pip install 'lcprune\[eval\]'.*piqa\.jsonl"):
        harness.prepare(["piqa"])


def results(**changes: Mapping[str, object]) -> Results:
    """What lm-eval returns of one task of two questions, with a metric under two filters."""
    figures = {
        "alias": "ours",
        "exact_match,strict": 0.5,
        "exact_match_stderr,strict": 0.25,
        "exact_match,loose": 1.0,
        "exact_match_stderr,loose": 0.0,
    }
    values = [("strict", 1), ("strict", 0), ("loose", 1), ("loose", 1)]
    samples = [{"filter": way, "exact_match": value} for way, value in values]
    found: dict[str, Mapping[str, object]] = {
        "results": {"ours": figures},
        "samples": {"ours": samples},
        "n-samples": {"ours": {"effective": 2}},
    }
    return {**found, **changes}


def test_scores_and_error_are_those_of_the_metric_and_filter_that_come_first():
    figures = harness._figures(results(), "ours")
    assert figures.metrics == {"exact_match,strict": 0.5, "exact_match,loose": 1.0}
    assert next(iter(figures.metrics)) == "exact_match,strict"
    assert (figures.scores, figures.stderr, figures.rows) == ((1.0, 0.0), 0.25, 2)


@pytest.mark.parametrize(
    ("account", "lower"), [({}, False), ({"ours": {}}, False), ({"ours": {"exact_match": False}}, True)]
)
def test_lower_is_better_where_the_harness_says_that_higher_is_not(account: dict[str, object], lower: bool):
    assert harness._figures(results(higher_is_better=account), "ours").lower_is_better == lower


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "ours.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (tmp_path / "ours.yaml").write_text(TASK.format(file=tmp_path / "ours.jsonl"))
    (tmp_path / "pair.yaml").write_text(GROUP)
    return tmp_path


@pytest.mark.slow  # lm-eval looks through all of its task files
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "limit"), [("ours", None), ("ours", 5), ("pair", None)])
def test_harness_gives_the_figures_of_our_own_files(
    name: str, limit: int | None, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
):
    model = tiny_llama(2)
    questions = choices.read(folder / "ours.jsonl")[:limit]
    expected = evaluate.of_answers(choices.answer(model, tiny_tokenizer, questions))
    found = harness.answer(model, tiny_tokenizer, harness.prepare([name], folder), limit)
    assert list(found) == [name]
    assert found[name].metrics["acc"] == expected.metrics["acc"]
    assert found[name].scores == expected.scores
    assert (found[name].rows, found[name].stderr) == (len(questions), pytest.approx(expected.stderr))
    assert name == "pair" or found[name].metrics == expected.metrics


@pytest.mark.slow  # lm-eval looks through all of its task files
@pytest.mark.filterwarnings("ignore")
def test_task_that_the_harness_does_not_know_is_refused_with_a_guess(folder: Path):
    with pytest.raises(InputError, match=r"--tasks ourz is no task .*did you mean ours\?.* has no ourz\.jsonl"):
        harness.prepare(["ourz"], folder)


@pytest.mark.slow  # lm-eval looks through all of its task files
@pytest.mark.filterwarnings("ignore")
def test_task_whose_data_are_not_there_is_refused(folder: Path):
    (folder / "ours.jsonl").unlink()
    with pytest.raises(InputError, match="--tasks ours cannot be asked"):
        harness.prepare(["ours"], folder)
