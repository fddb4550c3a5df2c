"""RefitSearch finds what brute force finds, judged after the refit, and gives the model back as it was."""

from itertools import count, product
from math import isfinite, nan
from typing import Any

import pytest
import torch

from lcprune.errors import InputError
from lcprune.merging import search as search_module
from lcprune.merging import surgery
from lcprune.merging.calibration import Batch, Calibration, evaluating, hidden_states, token_loss
from lcprune.merging.collapse import collapse, execute, plan
from lcprune.merging.concat import Concat
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, spec_of
from lcprune.merging.refit import RidgeRefit
from lcprune.merging.remeasure import measure_activity
from lcprune.merging.search import RefitSearch
from lcprune.merging.streams import Stream, regrouped
from tests.builders import Family, tiny_llama, token_batches
from tests.merging.planning import assert_same, groups_of, weights_of

BATCHES: list[Batch] = [{"input_ids": ids} for ids in token_batches(6, 2, 24)]
FIRST, LAST = Drop("first"), Drop("last")


def _by_hand(
    group: tuple[int, int], operator: Operator, fitting: list[Batch], judges: list[Batch], family: Family = "llama"
) -> float:
    """Held-out loss after this merge and a refit of its MLP projection alone."""
    student, teacher = tiny_llama(5, model_type=family), tiny_llama(5, model_type=family)
    step = MergeStep(group, spec_of(operator), (0.5, 0.5))
    surgery.apply(student, step, lambda wanted: measure_activity(student, fitting, wanted))
    refit = RidgeRefit(layers="merged", projections="mlp", strengths=[0.1])
    refit.refit(Stream(student, fitting), Stream(teacher, fitting), MergeHistory(5, (step,)).lineage, [group[0]])
    with evaluating(student):
        losses = [token_loss(student, hidden_states(student, batch), batch) for batch in judges]
    return sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)


def test_search_finds_what_brute_force_finds_on_five_layers():
    operators = [FIRST, LAST, Concat(selection="joint")]
    search = RefitSearch(also=operators[1:], fit_sequences=9, held_out_sequences=3)
    fitting, judges = search._texts(Calibration(tiny_llama(5), BATCHES))
    pairs = [(base, base + 1) for base in range(4)]
    losses = {(pair, each): _by_hand(pair, each, fitting, judges) for pair, each in product(pairs, operators)}
    (best, operator), loss = min(losses.items(), key=lambda item: item[1])
    (step,) = search.plan(Calibration(tiny_llama(5), BATCHES), FIRST, 4)
    assert step.group == best
    assert step.operator == spec_of(operator)
    assert step.scores["perplexity_after_refit"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2"])
def test_search_runs_a_merged_layer_as_the_kind_that_it_has_become(monkeypatch: pytest.MonkeyPatch, family: Family):
    monkeypatch.setattr(search_module, "CLEARLY_WORSE", 1e3)
    search = RefitSearch(fit_sequences=9, held_out_sequences=3)
    fitting, judges = search._texts(Calibration(tiny_llama(2, model_type=family), BATCHES))
    (step,) = search.plan(Calibration(tiny_llama(5, model_type=family), BATCHES), LAST, 4)
    losses = [_by_hand((base, base + 1), LAST, fitting, judges, family) for base in range(4)]
    assert step.base == losses.index(min(losses))
    assert step.scores["perplexity_after_refit"] == pytest.approx(torch.tensor(min(losses)).exp().item(), rel=1e-4)


@pytest.mark.parametrize("target", [1, 3, 5])
def test_search_reaches_its_target_and_restores_the_model(target: int):
    model = tiny_llama(5)
    before = weights_of(model)
    steps = RefitSearch(also=[LAST], candidates=2).plan(Calibration(model, BATCHES), FIRST, target)
    assert len(steps) == 5 - target
    assert all(len(group) == 2 for group in groups_of(steps))
    assert_same(model, before)
    assert model.config.num_hidden_layers == 5


def test_search_judges_by_sequences_it_does_not_fit_on():
    fitting, judges = RefitSearch(fit_sequences=4, held_out_sequences=2)._split(BATCHES)
    rows = [{tuple(row.tolist()) for batch in part for row in batch["input_ids"]} for part in (fitting, judges)]
    assert (len(rows[0]), len(rows[1])) == (4, 2)
    assert not rows[0] & rows[1]


@pytest.mark.parametrize(("seed", "base"), [(6, 0), (10, 0), (3, 1), (9, 2)])
def test_the_second_merge_is_the_one_a_new_search_finds_in_the_merged_and_refitted_student(
    monkeypatch: pytest.MonkeyPatch, seed: int, base: int
):
    # All of the held-out text for every candidate: half of so little of it says nothing.
    monkeypatch.setattr(search_module, "CLEARLY_WORSE", 1e3)
    search = RefitSearch(also=[LAST], candidates=100, fit_sequences=9, held_out_sequences=3)
    first, second = search.plan(Calibration(tiny_llama(5, seed=seed), BATCHES), FIRST, 3)
    assert first.base == base
    teacher, student = tiny_llama(5, seed=seed), tiny_llama(5, seed=seed)
    surgery.apply(student, first)
    done, (fitting, _) = MergeHistory(5, (first,)), search._texts(Calibration(teacher, BATCHES))
    refit = RidgeRefit(layers="merged", projections="mlp", strengths=[0.1])
    refit.refit(Stream(student, fitting), Stream(teacher, fitting), done.lineage, [base])
    (again,) = search.plan(Calibration(student, BATCHES, original=teacher, history=done), FIRST, 3)
    assert (second.group, second.operator, second.shares) == (again.group, again.operator, again.shares)
    assert second.scores["perplexity_after_refit"] == pytest.approx(again.scores["perplexity_after_refit"], rel=1e-5)


def test_fewer_candidates_are_fewer_trials(monkeypatch: pytest.MonkeyPatch):
    trials: list[int] = []
    attempt = search_module._Bench._try

    def counted(bench: Any, *args: Any) -> Any:
        trials[-1] += 1
        return attempt(bench, *args)

    monkeypatch.setattr(search_module._Bench, "_try", counted)
    for candidates in (1, 100):
        trials.append(0)
        RefitSearch(also=[LAST], candidates=candidates).plan(Calibration(tiny_llama(5), BATCHES), FIRST, 3)
    # Both operators at four places, then at three; or one at four and the other at the best of them, then the same
    # look again and at most two beside the merge.
    assert trials[1] == 8 + 6
    assert 5 + 1 <= trials[0] <= 5 + 3


def test_pairs_on_both_sides_of_the_last_merge_are_looked_at_again():
    history = MergeHistory(6, (MergeStep((2, 3), spec_of(FIRST), (1.0, 0.0)),))
    (wave,) = RefitSearch(candidates=1)._waves({(0, 0): 0.1, (4, 0): 0.2}, history, operators=1, turns=[])
    # By the teacher's layer where their first member ends: behind 1 the merged one begins, behind 3 it ends.
    assert wave == [(0, 0), (1, 0), (3, 0)]


def test_candidate_whose_loss_is_no_number_is_never_the_best(monkeypatch: pytest.MonkeyPatch):
    losses, calls = search_module._Bench._losses, count()

    def broken(bench: Any, *args: Any) -> list[tuple[float, int]]:
        first_candidate = next(calls) == 1  # before it the model as it is
        return [(nan if first_candidate else loss, tokens) for loss, tokens in losses(bench, *args)]

    monkeypatch.setattr(search_module._Bench, "_losses", broken)
    (found,) = RefitSearch().plan(Calibration(tiny_llama(4), BATCHES), FIRST, 3)
    assert isfinite(found.scores["perplexity_after_refit"])


def test_search_needs_two_sequences():
    with pytest.raises(InputError, match="calibration_blocks"):
        RefitSearch().plan(Calibration(tiny_llama(5), [{"input_ids": token_batches(1, 1)[0]}]), FIRST, 4)


def test_search_needs_labels_to_judge_by():
    batches = [{"input_ids": ids, "labels": torch.full_like(ids, -100)} for ids in token_batches(4, 1)]
    with pytest.raises(InputError, match="held_out_sequences"):
        RefitSearch().plan(Calibration(tiny_llama(5), batches), FIRST, 4)


@pytest.mark.parametrize(
    ("field", "value"), [("candidates", 0), ("fit_sequences", 0), ("held_out_sequences", 0), ("strength", 0.0)]
)
def test_search_refuses_what_it_cannot_do(field: str, value: float):
    with pytest.raises(InputError, match=field):
        RefitSearch(**{field: value})  # type: ignore[arg-type]


def test_collapse_with_a_refit_says_so_in_its_history_and_a_copy_of_the_plan_does_the_same():
    refit = RidgeRefit(strengths=[0.1])
    student, again = tiny_llama(6), tiny_llama(6)
    history = collapse(student, BATCHES, target_depth=4, refit=refit)
    assert [step.refit is not None for step in history.steps][-1]
    plain = tiny_llama(6)
    execute(plain, plan(plain, BATCHES, target_depth=4))
    execute(again, MergeHistory.from_json(history.to_json()), BATCHES)
    assert_same(student, again)
    down = "model.layers.3.mlp.down_proj.weight"
    assert not torch.equal(student.state_dict()[down], plain.state_dict()[down])


def test_refits_in_the_middle_of_a_plan_repair_only_what_merged_since():
    refit = {"class_path": "RidgeRefit", "init_args": {"strengths": [0.1], "layers": "merged"}}
    first = MergeStep((3, 4), spec_of(FIRST), (1.0, 0.0), refit=refit)
    second = MergeStep((1, 2), spec_of(FIRST), (1.0, 0.0), refit=refit)
    both, one = tiny_llama(6), tiny_llama(6)
    execute(both, MergeHistory(6, (first, second)), BATCHES)
    execute(one, MergeHistory(6, (first,)), BATCHES)
    name = "mlp.down_proj.weight"
    merged_first = [model.model.layers[place].get_parameter(name) for model, place in ((both, 2), (one, 3))]  # type: ignore[union-attr, operator, index]
    torch.testing.assert_close(*merged_first)


def test_a_plan_with_a_refit_needs_text():
    step = MergeStep((1, 2), spec_of(FIRST), (1.0, 0.0), refit={"class_path": "RidgeRefit"})
    model = tiny_llama(6)
    before = weights_of(model)
    with pytest.raises(InputError, match="calibration batches"):
        execute(model, MergeHistory(6, (step,)))
    assert_same(model, before)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "Nonsense"}, "is not a refit; known are MagnitudeCompensation, RidgeRefit"),
        ({"class_path": "os.system"}, "is not a refit"),
        ({"class_path": "RidgeRefit", "init_args": {"lambda": 1}}, "does not take 'lambda'"),
    ],
)
def test_a_plan_names_only_refits_that_exist(spec: dict[str, object], message: str):
    step = MergeStep((1, 2), spec_of(FIRST), (1.0, 0.0), refit=spec)
    with pytest.raises(InputError, match=message):
        execute(tiny_llama(6), MergeHistory(6, (step,)), BATCHES)


def test_regrouped_batches_hold_the_same_sequences_in_order():
    parts = [{"input_ids": ids} for ids in (*token_batches(5, 1, 8), *token_batches(2, 1, 6))]
    together = regrouped(parts, tiny_llama(1), tokens=16)
    assert [tuple(batch["input_ids"].shape) for batch in together] == [(2, 8), (2, 8), (1, 8), (2, 6)]
    flat = [row.tolist() for batch in together for row in batch["input_ids"]]
    assert flat == [row.tolist() for batch in parts for row in batch["input_ids"]]
