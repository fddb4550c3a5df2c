"""A plan after a glance at part of the text is the plan on all of it."""

from dataclasses import replace

import pytest
import torch

from lcprune.merging import progressive
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.concat import Concat
from lcprune.merging.criteria import AngularDistance
from lcprune.merging.operators import Drop
from lcprune.merging.progressive import ProgressivePlanner
from lcprune.merging.remeasure import Trail
from tests.builders import tiny_llama, token_batches
from tests.marks import slow
from tests.merging.activities import passes
from tests.merging.planning import groups_of, layers_of
from tests.merging.test_progressive import LAST, assert_same_plan, from_scratch


def many(number: int = 48) -> list[Batch]:
    return [{"input_ids": ids} for ids in token_batches(number // 2)]


@pytest.mark.parametrize("seed", [0, *slow(1, 2)])
@pytest.mark.parametrize("glance", [1, 160, None])
@pytest.mark.parametrize("criterion", [AngularDistance(span=2), LAST], ids=str)
def test_plan_after_a_glance_is_that_of_scoring_all_pairs_on_all_tokens(
    criterion: AngularDistance, glance: int | None, seed: int
):
    model = tiny_llama(9, seed=seed)
    steps = ProgressivePlanner(criterion, glance=glance).plan(Calibration(model, many()), Concat(), 4)
    assert_same_plan(steps, from_scratch(model, many(), Concat(), 4, criterion))


def test_share_after_a_glance_is_searched_on_all_tokens():
    model = tiny_llama(5)
    planner = ProgressivePlanner(shares="searched", grid=2, glance=160)
    whole = replace(planner, glance=None).plan(Calibration(model, many()), Concat(), 3)
    steps = planner.plan(Calibration(model, many()), Concat(), 3)
    assert groups_of(steps) == groups_of(whole)
    for one, other in zip(steps, whole, strict=True):
        assert one.shares == other.shares
        assert one.scores["TrialPerplexity"] == pytest.approx(other.scores["TrialPerplexity"], rel=1e-4)


def test_glance_of_few_tokens_decides_nothing():
    # Ten sequences of a glance, one token of each: by chance they agree, and are wrong.
    glance, rest = (torch.full((tokens, 9), 0.5, dtype=torch.float64) for tokens in (10, 38))
    parts = [progressive._Part.__new__(progressive._Part) for _ in range(2)]
    for part, angles_NL in zip(parts, (glance, rest), strict=True):
        part.angles = list(angles_NL.unbind(1))
    assert parts[0].may_beat((3, 4), (0, 1))
    parts[0].angles[3] = parts[0].angles[3] + 0.4
    parts[1].angles[3] = parts[1].angles[3] + 0.4
    assert parts[0].may_beat((3, 4), (0, 1))
    assert not parts[1].may_beat((3, 4), (0, 1))


def test_pair_is_clearly_worse_from_eight_standard_errors_on():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std() * 0.02  # a standard error of 0.001
    part = progressive._Part.__new__(progressive._Part)
    part.angles = [torch.full((400,), 0.5, dtype=torch.float64), 0.507 + noise, 0.509 + noise]
    assert part.may_beat((1, 2), (0, 1))
    assert not part.may_beat((2, 3), (0, 1))


def test_tokens_after_a_glance_run_only_as_far_as_the_pair_that_is_clearly_the_least(monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama(9)
    with torch.no_grad():
        for layer in layers_of(model)[2:4]:
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight.mul_(1e-2)
    run = passes(monkeypatch)
    (step,) = ProgressivePlanner(glance=160).plan(Calibration(model, many(30)), Concat(), 8)
    assert step.group == (2, 3)
    assert run == [*range(9), *range(4)]


def test_glance_is_spread_over_the_text_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch):
    texts = [trail.batches for trail in trails(monkeypatch, glance=64)]
    rows = [{tuple(row) for batch in text for row in batch["input_ids"].tolist()} for text in texts]
    assert list(map(len, rows)) == [4, 20]
    assert rows[0] | rows[1] == {tuple(row) for batch in many(24) for row in batch["input_ids"].tolist()}
    assert len(trails(monkeypatch, glance=24 * 16)) == 1


def trails(monkeypatch: pytest.MonkeyPatch, glance: int) -> list[Trail]:
    """Those of a plan on 24 sequences of 16 tokens."""
    made: list[Trail] = []
    original = Trail.__init__

    def noting(self: Trail, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trail, "__init__", noting)
        ProgressivePlanner(glance=glance).plan(Calibration(tiny_llama(3), many(24)), Drop(), 2)
    return made
