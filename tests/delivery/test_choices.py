"""Choices are scored as the definition says, whatever they are batched with; mistakes in a file name their line."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lcprune.delivery import choices
from lcprune.delivery.choices import Question
from lcprune.errors import InputError
from tests.builders import Family, tiny_llama, tiny_tokenizer

QUESTIONS = [
    Question("Question: what is 1 + 1?\nAnswer:", ("two", "three, or perhaps four"), 0),
    Question("a b c", ("d", "e", "f and so on"), 2),
    Question("Once upon a time", ("there was a layer", "x"), 1),
    Question("The end", ("of it", "is near"), 0),
]


def _scores(model: PreTrainedModel, context: list[int], choice: list[int]) -> float:
    """Log-likelihood of a choice by a pass of its own over full logits."""
    with torch.no_grad():
        values = model(input_ids=torch.tensor([context + choice])).logits[0].log_softmax(-1)
    return sum(values[place - 1, token].item() for place, token in enumerate(context + choice) if place >= len(context))


def _best(scores: list[float]) -> int:
    return scores.index(max(scores))


def _by_hand(model: PreTrainedModel, question: Question, begin: list[int], longest: int = 10**6) -> tuple[bool, bool]:
    tokenizer = tiny_tokenizer()
    scores = []
    for choice in question.choices:
        context, behind = (tokenizer(text).input_ids for text in (question.context, " " + choice))
        scores.append(_scores(model, (begin + context)[max(0, len(begin + context + behind) - longest) :], behind))
    per_character = [score / len(choice) for score, choice in zip(scores, question.choices, strict=True)]
    return _best(scores) == question.label, _best(per_character) == question.label


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt2", "bloom"])
def test_answers_are_those_of_full_logits_without_padding(model_type: Family, tiny_tokenizer: PreTrainedTokenizerFast):
    model = tiny_llama(2, model_type=model_type)
    expected = [_by_hand(model, question, []) for question in QUESTIONS]
    found = choices.answer(model, tiny_tokenizer, QUESTIONS)
    assert list(zip(found.acc, found.acc_norm, strict=True)) == expected
    assert found.acc != found.acc_norm  # these questions tell them apart, or the test would not


@pytest.mark.parametrize("tokens", [1, 100])
def test_answers_do_not_depend_on_the_batches(
    tokens: int, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_llama(2)
    usual = choices.answer(model, tiny_tokenizer, QUESTIONS)
    monkeypatch.setattr(choices, "TOKENS_AT_ONCE", tokens)
    assert choices.answer(model, tiny_tokenizer, QUESTIONS) == usual


def test_answers_begin_with_the_bos_where_the_tokenizer_does():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "0"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("0 $A", special_tokens=[("0", 2)])
    model, seen = tiny_llama(2), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0]))
    choices.answer(model, tokenizer, QUESTIONS)
    assert all((ids[:, 0] == 2).all() and (ids[:, 1] != 2).all() for ids in seen)


def test_context_too_long_for_the_model_loses_its_beginning(tiny_tokenizer: PreTrainedTokenizerFast):
    model = tiny_llama(2, model_type="gpt2")
    long = [Question("ab" * 300 + question.context, question.choices, question.label) for question in QUESTIONS]
    expected = [_by_hand(model, question, [], longest=256) for question in long]
    found = choices.answer(model, tiny_tokenizer, long)
    assert list(zip(found.acc, found.acc_norm, strict=True)) == expected


def test_blanks_at_the_end_of_a_context_are_scored_with_the_choice(tiny_tokenizer: PreTrainedTokenizerFast):
    """As lm-eval does: the text is the same, what is scored begins with them."""
    one = choices._sentence(tiny_llama(2), tiny_tokenizer, "layer ", "merge")
    assert tiny_tokenizer.decode(one.ids[one.start :]) == "  merge"


def test_choice_without_a_context_is_scored_behind_the_end_of_text(tiny_tokenizer: PreTrainedTokenizerFast):
    question = Question("", ("a", "b", "c", "d"), 1)
    model = tiny_llama(2)
    assert choices.answer(model, tiny_tokenizer, [question]).acc == (_by_hand(model, question, [1])[0],)


def _file(folder: Path, *rows: object) -> Path:
    path = folder / "task.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("limit", "labels"), [(None, [0, 1, 2, 3, 4, 5]), (3, [0, 2, 4]), (4, [0, 1, 3, 4]), (9, list(range(6)))]
)
def test_limited_questions_are_evenly_spaced(limit: int | None, labels: list[int], tmp_path: Path):
    rows = [{"id": "x", "context": "c", "choices": list("abcdef"), "label": label} for label in range(6)]
    assert [question.label for question in choices.read(_file(tmp_path, *rows), limit)] == labels


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "task.jsonl:2 is not JSON"),
        ([1], "task.jsonl:2: context=None"),
        ({"context": 3}, "task.jsonl:2: context=3 must be text"),
        ({"context": "c", "choices": ["a"]}, "choices=.* two texts or more"),
        ({"context": "c", "choices": ["a", ""]}, "none of them empty"),
        ({"context": "c", "choices": ["a", "b"], "label": 2}, "label=2 .* 0 to 1"),
        ({"context": "c", "choices": ["a", "b"], "label": True}, "label=True"),
    ],
)
def test_mistake_in_a_task_file_names_its_line(row: object, message: str, tmp_path: Path):
    good = {"context": "c", "choices": ["a", "b"], "label": 0}
    with pytest.raises(InputError, match=message):
        choices.read(_file(tmp_path, good, row))


def test_row_may_hold_what_ends_a_line_elsewhere(tmp_path: Path):
    row = {"context": "a\u2028b\x85c", "choices": ["d\u2029", "e"], "label": 0}
    path = _file(tmp_path, json.dumps(row, ensure_ascii=False))
    assert [question.context for question in choices.read(path)] == [row["context"]]


def test_task_file_without_rows_or_not_there_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="holds no rows"):
        choices.read(_file(tmp_path, ""))
    with pytest.raises(InputError, match=r"nothing\.jsonl cannot be read"):
        choices.read(tmp_path / "nothing.jsonl")
