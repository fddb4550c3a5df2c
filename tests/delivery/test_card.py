"""The model card says what the history says, in a front matter that YAML reads."""

import pytest
import yaml

from lcprune.delivery.card import METHOD_OF_OPERATOR, model_card
from lcprune.merging.lineage import MergeHistory, MergeStep


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


@pytest.mark.parametrize(
    ("teacher", "base_model"), [("example/tiny", "example/tiny"), ("/home/me/model", None), ("", None), ("gpt2", None)]
)
def test_card_gives_the_hub_a_base_model_only_where_it_knows_one(teacher: str, base_model: str | None):
    assert _front_matter(model_card(_history("Drop", teacher=teacher), figures={})).get("base_model") == base_model


@pytest.mark.parametrize(("global_step", "distilled"), [(0, True), (None, False)])
def test_card_claims_distillation_only_for_merges_in_training(global_step: int | None, distilled: bool):
    tags = _front_matter(model_card(_history("Drop", global_step=global_step), figures={}))["tags"]
    assert ("distillation" in tags) == distilled


@pytest.mark.parametrize("operator", METHOD_OF_OPERATOR)
def test_card_cites_the_papers_of_the_operators_used_and_no_other(operator: str):
    card = model_card(_history(f"lcprune.merging.operators.{operator}"), figures={})
    assert card.count("https://arxiv.org/abs/") == 1


def test_card_cites_nothing_for_an_operator_of_the_users_own():
    assert "arxiv" not in model_card(_history("Mine"), figures={})
