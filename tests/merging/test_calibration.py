"""What is measured on text, against what transformers itself returns."""

import weakref
from collections.abc import Callable
from functools import partial
from math import pi

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import calibration as room
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import (
    Batch,
    Calibration,
    LayerStats,
    collect,
    evaluating,
    hidden_states,
    layer_outputs,
    next_tokens,
    token_loss,
)
from lcprune.merging.criteria import BlockInfluence
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.prefix import PrefixCache, prefixes_of
from tests.builders import ALL_FAMILIES, FAMILIES, Family, tiny_llama, token_batches
from tests.merging.planning import last_states, layers_of, masked, plain

DROP_FIRST = {"class_path": "Drop", "init_args": {"keep": "first"}}
SPANS = (1, 2, 3)


def streams_of(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """h_0 .. h_L from transformers, the last one taken before the final norm instead of after it."""
    before_norm: list[Tensor] = []
    norm = model.get_submodule(layout_of(model.config).final_norm)
    handle = norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    return [*states[:-1], before_norm[0]]


def brute_force(model: PreTrainedModel, batches: list[Batch]) -> LayerStats:
    """One token after the other, in float64."""
    cosines: dict[tuple[int, int], list[float]] = {}
    for batch in batches:
        states = [state.double() for state in streams_of(model, batch)]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for n in SPANS:
            for start in range(len(states) - n):
                cos_BT = cosine_similarity(states[start], states[start + n], dim=-1)
                cosines.setdefault((n, start), []).extend(cos_BT[mask.bool()].tolist())
    depth = model.config.num_hidden_layers
    means = {key: sum(values) / len(values) for key, values in cosines.items()}
    angles = {key: torch.tensor(values).double().arccos().mean().item() / pi for key, values in cosines.items()}
    return LayerStats(
        {n: tuple(means[n, start] for start in range(depth + 1 - n)) for n in SPANS},
        {n: tuple(angles[n, start] for start in range(depth + 1 - n)) for n in SPANS},
        len(cosines[1, 0]),
    )


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("batches", [plain(), masked()], ids=["plain", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_collect_equals_brute_force(family: Family, batches: list[Batch]):
    model = tiny_llama(model_type=family)
    expected, stats = brute_force(model, batches), collect(model, batches, SPANS)
    assert stats.tokens == expected.tokens
    for n in SPANS:
        assert len(stats.cosine[n]) == len(stats.angle[n]) == 6 + 1 - n
        assert stats.cosine[n] == pytest.approx(expected.cosine[n], abs=1e-6)
        assert stats.angle[n] == pytest.approx(expected.angle[n], abs=1e-6)


def test_collect_of_one_span_does_not_depend_on_the_others():
    model = tiny_llama()
    alone, together = collect(model, plain(), (3,)), collect(model, plain(), (3, 1, 2))
    assert alone.cosine[3] == together.cosine[3]


def test_collect_averages_over_tokens_and_not_over_batches():
    model = tiny_llama()
    one, both = masked()[:1], masked()[1:]
    stats = [collect(model, batches) for batches in (one, both, one + both)]
    expected = sum(part.cosine[1][2] * part.tokens for part in stats[:2]) / stats[2].tokens
    assert stats[2].cosine[1][2] == pytest.approx(expected, abs=1e-9)


def test_identity_layer_has_cosine_one_and_angle_zero():
    model = tiny_llama()
    with torch.no_grad():
        layers_of(model)[2].self_attn.o_proj.weight.zero_()
        layers_of(model)[2].mlp.down_proj.weight.zero_()
    stats = collect(model, plain())
    assert stats.cosine[1][2] == pytest.approx(1, abs=1e-6)
    assert stats.angle[1][2] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("spans", [(0,), (-1, 1), (7,), (1, 7)])
def test_collect_refuses_spans_outside_the_model(spans: tuple[int, ...]):
    with pytest.raises(InputError, match=r"spans=.* must lie between 1 and the model's 6 layers"):
        collect(tiny_llama(), plain(), spans)


def test_longest_span_is_the_whole_model():
    model = tiny_llama(n_layers=4)
    assert len(collect(model, plain(), (4,)).angle[4]) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_after_the_final_norm(family: Family):
    model = tiny_llama(model_type=family)
    for batch, expected in zip(masked(), last_states(model, masked()), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(hidden_states(model, batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_outputs_are_the_streams_after_the_layers(family: Family):
    model = tiny_llama(model_type=family)
    batch = plain()[0]
    expected = streams_of(model, batch)
    with torch.no_grad(), layer_outputs(layers_of(model), [0, 3, 5]) as states:
        hidden_states(model, batch)
    assert set(states) == {0, 3, 5}
    for index, state in states.items():
        torch.testing.assert_close(state, expected[index + 1], rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("labelled", [False, True])
def test_token_loss_is_transformers_own(labelled: bool, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "HEAD_CHUNK", chunk)
    model = tiny_llama()
    ids = token_batches(1)[0]
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    batch = {"input_ids": ids, **({"labels": labels} if labelled else {})}
    with torch.no_grad():
        expected = model(ids, labels=labels if labelled else ids).loss.item()
        total, count = token_loss(model, hidden_states(model, batch), batch)
    assert count == (int((labels[:, 1:] != -100).sum()) if labelled else 30)
    assert total / count == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("mask", "targets"),
    [
        ([1, 1, 1, 0, 0], [6, 7, -100, -100, -100]),
        ([0, 0, 1, 1, 1], [-100, -100, 8, 9, -100]),
        ([1, 1, 1, 1, 1], [6, 7, 8, 9, -100]),
    ],
)
def test_padding_is_neither_predicted_nor_predicts(mask: list[int], targets: list[int]):
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.tensor([mask])}
    assert next_tokens(batch).tolist() == [targets]
    assert next_tokens({**batch, "labels": batch["input_ids"]}).tolist() == [targets]
    assert token_loss(tiny_llama(), torch.zeros(1, 5, 32), batch)[1] == sum(target != -100 for target in targets)


def test_token_loss_of_labels_that_score_nothing_is_zero_over_zero_tokens():
    model = tiny_llama()
    batch = {**plain()[0], "labels": torch.full((2, 16), -100)}
    assert token_loss(model, torch.zeros(2, 16, 32), batch) == (0.0, 0)


def test_token_loss_of_half_precision_logits_is_taken_in_single_precision():
    model, batch = tiny_llama(2, dtype=torch.bfloat16), plain()[0]
    with torch.no_grad():
        state = model.model(**batch).last_hidden_state
        logits = model.lm_head(state).float()
    expected = cross_entropy(logits.flatten(0, 1), next_tokens(batch).flatten(), reduction="sum").item()
    assert token_loss(model, state, batch)[0] == pytest.approx(expected, rel=1e-6)


def half_training(model: PreTrainedModel) -> dict[str, bool]:
    """Modes that a plain model.train() or model.eval() would not bring back."""
    model.train()
    layers_of(model)[2].eval()
    return {name: module.training for name, module in model.named_modules()}


def test_evaluating_restores_every_modules_own_mode_even_when_the_body_raises():
    model = tiny_llama()
    modes = half_training(model)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_last_state_of_a_model_that_returns_tuples_is_that_of_one_that_does_not(family: Family):
    model = tiny_llama(model_type=family)
    expected = hidden_states(model, plain()[0])
    model.config.return_dict = False
    assert torch.equal(hidden_states(model, plain()[0]), expected)


def test_evaluating_is_eval_mode_without_gradients():
    model = tiny_llama()
    half_training(model)
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()


def test_measuring_restores_modes_and_gradients_and_leaves_no_hooks():
    model = tiny_llama()
    modes, hooks = half_training(model), hooks_of(model)
    calibration = Calibration(model, plain())
    calibration.stats(1, 2)
    states = prefixes_of(calibration, 3).run(2)
    next(states)  # not exhausted: what a caller that stops early leaves behind
    assert calibration.reference[0].grad_fn is None
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("measure", [collect, partial(PrefixCache, highest=2)], ids=["collect", "prefix"])
def test_no_hook_is_left_when_a_batch_cannot_be_run(measure: Callable[..., object]):
    model = tiny_llama()
    hooks = hooks_of(model)
    with pytest.raises(IndexError):
        measure(model, [{"input_ids": torch.tensor([[10_000]])}])
    assert hooks_of(model) == hooks


def test_no_hook_is_left_when_the_body_of_layer_outputs_raises():
    model = tiny_llama()
    hooks = hooks_of(model)
    with pytest.raises(ZeroDivisionError), layer_outputs(layers_of(model), [1]):
        raise ZeroDivisionError
    assert hooks_of(model) == hooks


def test_calibration_without_batches_is_refused():
    with pytest.raises(InputError, match=r"no calibration batches: set data\.calibration_blocks"):
        Calibration(tiny_llama(), [])


def test_stats_are_collected_once(monkeypatch: pytest.MonkeyPatch):
    calibration = Calibration(tiny_llama(), plain())
    first = calibration.stats(1)
    monkeypatch.setattr(room, "collect", None)
    assert calibration.stats(1) is first


def merge_two(model: PreTrainedModel) -> None:
    surgery.apply(model, MergeStep((1, 2), DROP_FIRST, (0.5, 0.5)))


def write_in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        layers_of(model)[2].mlp.down_proj.weight.mul_(2.0)


def take_new_storage(model: PreTrainedModel) -> None:
    weight = layers_of(model)[2].mlp.down_proj.weight
    weight.data = 2 * weight.data


@pytest.mark.parametrize("change", [merge_two, write_in_place, take_new_storage])
def test_a_model_that_has_changed_is_measured_afresh(change: Callable[[PreTrainedModel], None]):
    model = tiny_llama()
    calibration = Calibration(model, plain())
    before = calibration.stats(1), calibration.scores("BlockInfluence", BlockInfluence().score)
    change(model)
    after = calibration.stats(1), calibration.scores("BlockInfluence", BlockInfluence().score)
    anew = Calibration(model, plain())
    assert after == (anew.stats(1), BlockInfluence().score(anew))
    assert after != before


def test_every_trial_is_measured_itself():
    model = tiny_llama()
    calibration = Calibration(model, plain())
    before, found = calibration.stats(1), []
    for keep in ("first", "last", "first"):  # what the first leaves free the next may get, at the same address
        step = MergeStep((1, 2), {"class_path": "Drop", "init_args": {"keep": keep}}, (0.5, 0.5))
        with surgery.trial(model, step):
            found.append(calibration.stats(1))
            assert found[-1] == collect(model, plain())
    assert calibration.stats(1) == before
    assert found[0] == found[2] != found[1]


def test_measuring_keeps_no_weights_alive():
    model = tiny_llama()
    calibration = Calibration(model, plain())
    calibration.stats(1)
    storages = [weakref.ref(parameter.untyped_storage()) for parameter in layers_of(model)[2].parameters()]
    merge_two(model)
    assert all(storage() is None for storage in storages)
    assert calibration.stats(1).tokens > 0


def test_reference_is_the_original_models_last_state():
    model, original = tiny_llama(n_layers=4), tiny_llama(seed=1)
    torch.testing.assert_close(
        list(Calibration(model, plain(), original).reference), last_states(original, plain()), rtol=0, atol=0
    )
    torch.testing.assert_close(list(Calibration(model, plain()).reference), last_states(model, plain()), rtol=0, atol=0)


def test_lineage_is_that_of_the_history():
    history = MergeHistory(6, (MergeStep((1, 2, 3), DROP_FIRST, (1.0, 0.0, 0.0)),))
    assert Calibration(tiny_llama(n_layers=4), plain(), history=history).lineage == ((0,), (1, 2, 3), (4,), (5,))
    assert Calibration(tiny_llama(n_layers=4), plain()).lineage == ((0,), (1,), (2,), (3,))
