"""The model card says what the history says, in a front matter that YAML reads."""

import re
from pathlib import Path

import pytest
import yaml

import lcprune
from lcprune import Operator, Planner, ProgressiveCollapse, Refit
from lcprune.delivery import card as cards
from lcprune.delivery.card import METHOD_OF, model_card, with_evaluation
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.models import License


def _history(*operators: str, teacher: str = "example/tiny", global_step: int | None = 5) -> MergeHistory:
    steps = [MergeStep((2, 3), {"class_path": name}, (0.5, 0.5), global_step=global_step) for name in operators]
    return MergeHistory(8, tuple(steps), teacher)


def _front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_names_every_merge_the_lineage_and_the_figures():
    card = model_card(_history("Drop", "my.own.Operator"), figures={"val/perplexity": 41.23456, "parameters": 1234567})
    assert "| 1 | 5 | 2, 3 | Drop | 0.5, 0.5 |" in card
    assert "| 2 | 5 | 2, 3 | Operator | 0.5, 0.5 |" in card
    assert "| 2 | 2, 3, 4 |" in card
    assert "| val/perplexity | 41.23 |" in card
    assert "| parameters | 1,234,567 |" in card
    assert "8 -> 6 layers" in card


@pytest.mark.parametrize(
    ("license", "field", "text"),
    [("apache-2.0", "apache-2.0", "apache-2.0"), (None, "unknown", "unknown: see the base model")],
)
def test_card_states_the_licence(license: str | None, field: str, text: str):
    card = model_card(_history("Drop"), figures={}, license=license)
    assert _front_matter(card)["license"] == field
    assert f"Licence of the base model: {text}." in card


def test_card_carries_what_another_licence_is_called_and_where_it_is():
    terms = License("other", "my-licence", "LICENSE")
    card = model_card(_history("Drop"), figures={}, license=terms)
    assert {name: _front_matter(card)[name] for name in ("license", "license_name", "license_link")} == {
        "license": "other",
        "license_name": "my-licence",
        "license_link": "LICENSE",
    }
    assert "Licence of the base model: other (my-licence, LICENSE)." in card


def test_card_tells_nobody_where_a_teacher_lies(tmp_path: Path):
    card = model_card(_history("Drop", teacher="/home/me/models/tiny"), figures={})
    assert "A shorter version of `tiny`," in card
    assert "/home" not in card
    assert "of `example/tiny`," in model_card(_history("Drop"), figures={})


@pytest.mark.parametrize(
    ("teacher", "base_model"), [("example/tiny", "example/tiny"), ("/home/me/model", None), ("", None), ("gpt2", None)]
)
def test_card_gives_the_hub_a_base_model_only_where_it_knows_one(teacher: str, base_model: str | None):
    assert _front_matter(model_card(_history("Drop", teacher=teacher), figures={})).get("base_model") == base_model


def test_card_does_not_take_a_folder_for_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in _front_matter(model_card(_history("Drop", teacher="models/tiny"), figures={}))


@pytest.mark.parametrize(("global_step", "distilled"), [(0, True), (None, False)])
def test_card_claims_distillation_only_for_merges_in_training(global_step: int | None, distilled: bool):
    tags = _front_matter(model_card(_history("Drop", global_step=global_step), figures={}))["tags"]
    assert ("distillation" in tags) == distilled


@pytest.mark.parametrize("operator", [name for name in METHOD_OF if issubclass(getattr(lcprune, name), Operator)])
def test_card_cites_the_papers_of_the_operators_used_and_no_other(operator: str):
    card = model_card(_history(f"lcprune.merging.operators.{operator}"), figures={})
    assert card.count("https://arxiv.org/abs/") == 1


def test_card_cites_nothing_for_an_operator_of_the_users_own():
    assert "arxiv" not in model_card(_history("Mine"), figures={})


def test_papers_are_those_of_classes_that_there_are():
    assert all(issubclass(getattr(lcprune, name), Operator | Refit | Planner) for name in METHOD_OF)
    assert set(METHOD_OF.values()) == set(cards.METHODS)
    assert type(ProgressiveCollapse().planner).__name__ == cards.PLANNER


def _cited(recipe: str | None, refit: str | None = None) -> list[str]:
    """arXiv numbers in the card of a student merged by an operator of the user's own."""
    step = MergeStep((2, 3), {"class_path": "Mine"}, (0.5, 0.5), refit=None if refit is None else {"class_path": refit})
    return re.findall(r"arxiv.org/abs/(\S+)", model_card(MergeHistory(8, (step,)), figures={}, recipe=recipe))


def test_card_cites_the_refit_that_the_history_names():
    assert _cited(None, "lcprune.merging.refit.MagnitudeCompensation") == ["2507.18212"]
    assert _cited(None, "lcprune.merging.refit.RidgeRefit") == []


@pytest.mark.parametrize(
    ("recipe", "cited"),
    [
        ("collapse: {planner: {class_path: lcprune.ContiguousBlock}}", ["2403.17887"]),
        ("collapse: {planner: {class_path: lcprune.merging.greedy.GreedyPlanner}}", ["2402.09025"]),
        ("collapse: {planner: {class_path: ThresholdPlanner}}", ["2402.11187"]),
        ("collapse: {planner: {class_path: ProgressivePlanner, init_args: {power: 1}}}", ["2510.15304"]),
        ("collapse: {planner: {class_path: FixedPlan}}", []),
        ("collapse: {planner: null}", ["2403.03853"]),
        (
            "collapse: {planner: {class_path: FixedPlan}, stages: [{planner: {class_path: GreedyPlanner}}, {}]}",
            ["2402.09025"],
        ),
        ("collapse: {schedule: null, planner: null}\nmodel: {student: short}", []),
        ("data: {path: mine.txt}", []),
    ],
)
def test_card_cites_the_planner_that_the_recipe_names(recipe: str, cited: list[str]):
    assert _cited(recipe) == cited


RECIPE = """
data:
  tokenizer: /home/me/model
  path: /home/me/secret/mine.jsonl
  dataset: null
  block_size: 256
  generate: {prompts: ~/prompts.txt, documents: 8, model: null}
model: {teacher: x}
"""


def test_card_tells_the_data_and_not_where_they_lie():
    card = model_card(_history("Drop"), figures={}, recipe=RECIPE)
    section = card.partition("## Data\n")[2].partition("```yaml\n")[2].partition("```")[0]
    expected = {"path": "mine.jsonl", "block_size": 256, "generate": {"prompts": "prompts.txt", "documents": 8}}
    assert yaml.safe_load(section) == expected
    assert "/home" not in card


def test_card_names_the_built_in_text_where_no_other_is_set():
    assert "pydoc_data.topics" in model_card(_history("Drop"), figures={}, recipe="data: {block_size: 256}")
    assert "pydoc_data.topics" not in model_card(_history("Drop"), figures={}, recipe=RECIPE)


@pytest.mark.parametrize("recipe", [None, "model: {teacher: x}"])
def test_card_without_known_data_says_nothing_of_them(recipe: str | None):
    assert "## Data" not in model_card(_history("Drop"), figures={}, recipe=recipe)


def test_card_holds_the_last_evaluation_and_all_that_was_there_before():
    card = model_card(_history("Drop"), figures={"layers": 7}).replace("## Figures", "Edited.\n\n## Figures")
    once = with_evaluation(card, [("", "model"), ("rep-4", "0.9")], "On a text.")
    twice = with_evaluation(once, [("", "model"), ("rep-4", "0.2")], "On another text.")
    assert "| rep-4 | 0.9 |" in once
    assert twice == once.replace("0.9", "0.2").replace("On a text.", "On another text.")
    assert once.replace(once[once.index("## Evaluation") : once.index("## How to load it")], "") == card


def test_evaluation_goes_to_the_end_of_a_card_that_is_not_ours():
    assert with_evaluation("# Mine\n", [("", "model"), ("rep-4", "0.9")], "On a text.").startswith(
        "# Mine\n## Evaluation"
    )
