"""Refits repair what a merge broke, change nothing where nothing is broken, and never make it worse."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import inf, nan

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig, PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch
from lcprune.merging.collapse import collapse, execute
from lcprune.merging.concat import Concat
from lcprune.merging.lineage import Lineage, MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, Rdsc, ReplaceWithLast, WeightedAverage, spec_of
from lcprune.merging.refit import MagnitudeCompensation, Refit, RidgeRefit, from_spec
from lcprune.merging.refit import spec_of as spec_of_refit
from lcprune.merging.regression import Sums, token_weights
from lcprune.merging.remeasure import measure_activity
from lcprune.merging.streams import Stream
from tests.builders import ALL_FAMILIES, FAMILIES, Family, tiny_llama, token_batches
from tests.merging.planning import assert_same, layers_of, weights_of

BATCHES: list[Batch] = [{"input_ids": ids} for ids in token_batches(4, 4, 48)]
FEW: list[Batch] = [{"input_ids": ids} for ids in token_batches(2, 1, 12)]
WEAK = RidgeRefit(strengths=[1e-3])
FIRST = Drop("first")
ZEROS = Sums.zeros


def _merged(operator: Operator = FIRST, *groups: tuple[int, ...], family: Family = "llama"):
    """Student, teacher, lineage and the places merged."""
    teacher, student = tiny_llama(model_type=family), tiny_llama(model_type=family)
    steps = [
        MergeStep(group, spec_of(operator), [1 / len(group)] * len(group))  # type: ignore[arg-type]
        for group in groups or ((2, 3),)
    ]
    surgery.apply_all(student, steps, lambda wanted: measure_activity(student, BATCHES, wanted))
    return student, teacher, MergeHistory(6, steps).lineage  # type: ignore[arg-type]


def _refit(refit: Refit, student: PreTrainedModel, teacher: PreTrainedModel, lineage: Lineage) -> None:
    merged = [place for place, ancestors in enumerate(lineage) if len(ancestors) > 1]
    refit.refit(Stream(student, BATCHES), Stream(teacher, BATCHES), lineage, merged)


def _states(model: PreTrainedModel, batches: Sequence[Batch] = BATCHES) -> list[list[Tensor]]:
    """After every layer, batch by batch."""
    stream, found = Stream(model, batches), []
    for layer in layers_of(model):
        stream.advance(layer)
        found.append(list(stream.states))
    return found


def _errors(
    student: PreTrainedModel, teacher: PreTrainedModel, lineage: Lineage, batches: Sequence[Batch] = BATCHES
) -> list[float]:
    """Squared distance to the teacher's stream behind every student layer."""
    ours, theirs = _states(student, batches), _states(teacher, batches)
    return [
        sum((a - b).square().sum().item() for a, b in zip(ours[place], theirs[ancestors[-1]], strict=True))
        for place, ancestors in enumerate(lineage)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_ridge_lowers_the_error_behind_the_merged_layer(family: Family):
    student, teacher, lineage = _merged(family=family)
    before = _errors(student, teacher, lineage)
    _refit(WEAK, student, teacher, lineage)
    assert _errors(student, teacher, lineage)[2] < 0.8 * before[2]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_ridge_serves_every_family(family: Family):
    student, teacher, lineage = _merged(family=family)
    before = _errors(student, teacher, lineage)
    _refit(WEAK, student, teacher, lineage)
    assert all(
        late < 0.9 * early for late, early in zip(_errors(student, teacher, lineage), before, strict=True) if early
    )


@pytest.mark.parametrize(
    "operator", [Drop("first"), Drop("last"), WeightedAverage(), Rdsc(), ReplaceWithLast(), Concat(), Concat("joint")]
)
def test_ridge_lowers_the_error_after_every_operator(operator: Operator):
    student, teacher, lineage = _merged(operator, (3, 4), (1, 2))
    before = _errors(student, teacher, lineage)
    _refit(WEAK, student, teacher, lineage)
    after = _errors(student, teacher, lineage)
    assert after[0] == before[0]
    assert all(late < early for late, early in zip(after[1:], before[1:], strict=True))


@pytest.mark.parametrize("refit", [RidgeRefit(), RidgeRefit(strengths=[0.01]), MagnitudeCompensation()])
def test_nothing_changes_where_the_student_is_the_teacher(refit: Refit):
    student, teacher = tiny_llama(), tiny_llama()
    refit.refit(Stream(student, BATCHES), Stream(teacher, BATCHES), MergeHistory(6).lineage, [2])
    assert_same(student, teacher)


@pytest.mark.parametrize("operator", [Drop("first"), WeightedAverage(), Concat()])
@pytest.mark.parametrize("text", [2, 4], ids=["little text", "more"])
def test_ridge_as_it_comes_raises_no_error_behind_a_merge(operator: Operator, text: int):
    student, teacher, lineage = _merged(operator, (3, 4), (1, 2))
    few = [{"input_ids": batch["input_ids"][:2, :24]} for batch in BATCHES[:text]]
    before = _errors(student, teacher, lineage, few)
    merged = [place for place, ancestors in enumerate(lineage) if len(ancestors) > 1]
    RidgeRefit().refit(Stream(student, few), Stream(teacher, few), lineage, merged)
    after = _errors(student, teacher, lineage, few)
    assert all(late <= early for late, early in zip(after, before, strict=True))


@pytest.mark.parametrize("strength", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_ridge_raises_no_error_behind_experts_that_read_what_the_attention_writes(family: Family, strength: float):
    student, teacher, lineage = _merged(Rdsc(), (2, 3, 4, 5), family=family)

    def error() -> float:
        pairs = zip(_states(student)[2], _states(teacher)[5], strict=True)
        return sum(float((token_weights(b, None) * (a - b).square().sum(-1)).sum()) for a, b in pairs)

    before = error()
    _refit(RidgeRefit(layers="merged", strengths=[strength]), student, teacher, lineage)
    assert error() <= before


def test_ridge_is_least_squares_where_it_hardly_shrinks():
    student, teacher, lineage = _merged()
    inputs: list[Tensor] = []
    layer = layers_of(student)[2]
    with_hook = layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    reached, wanted = _states(student)[2], _states(teacher)[3]
    with_hook.remove()
    weight = layer.mlp.down_proj.weight.detach().clone()
    z = torch.cat([each.flatten(0, 1) for each in inputs]).double()
    e = torch.cat([(b - a).flatten(0, 1) for a, b in zip(reached, wanted, strict=True)]).double()
    length = [state.norm(dim=-1) for state in wanted]
    root = torch.cat([(each.median() / each).clamp(max=1).flatten() for each in length]).sqrt().double()[:, None]
    expected = weight.double() + torch.linalg.lstsq(z * root, e * root).solution.T
    _refit(RidgeRefit(layers="merged", projections="mlp", strengths=[1e-10]), student, teacher, lineage)
    torch.testing.assert_close(layer.mlp.down_proj.weight.detach().double(), expected, rtol=1e-3, atol=1e-3)


def test_ridge_touches_only_what_it_says():
    student, teacher, lineage = _merged()
    before = weights_of(student)
    _refit(RidgeRefit(layers="merged", projections="mlp", strengths=[0.01]), student, teacher, lineage)
    changed = [name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["model.layers.2.mlp.down_proj.weight"]
    student, teacher, lineage = _merged()
    _refit(WEAK, student, teacher, lineage)
    changed = [name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {name.split(".", 3)[3] for name in changed} == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    assert {name.split(".")[2] for name in changed} == {"2", "3", "4"}


def test_ridge_leaves_the_teacher_alone_even_where_it_shares_storage():
    teacher = tiny_llama()
    student = surgery.second_view(teacher)
    before = weights_of(teacher)
    step = MergeStep((2, 3), spec_of(Drop("first")), (1.0, 0.0))
    surgery.apply(student, step)
    _refit(WEAK, student, teacher, MergeHistory(6, (step,)).lineage)
    assert_same(teacher, before)


def test_ridge_keeps_the_identity_of_every_parameter():
    student, teacher, lineage = _merged()
    before = [id(parameter) for parameter in student.parameters()]
    _refit(WEAK, student, teacher, lineage)
    assert [id(parameter) for parameter in student.parameters()] == before


def test_ridge_does_not_fit_chance():
    # Two sequences cannot tell 64 inputs apart: on held-out text an unshrunk fit is worse than none.
    teacher, student = tiny_llama(), tiny_llama()
    lineage = MergeHistory(6, (MergeStep((2, 3), spec_of(Drop("first")), (1.0, 0.0)),)).lineage
    surgery.apply(student, MergeStep((2, 3), spec_of(Drop("first")), (1.0, 0.0)))
    before = weights_of(student)
    refit = RidgeRefit(layers="merged", projections="mlp", strengths=[1e-9, 1e6], held_out=0.5)
    refit.refit(Stream(student, FEW), Stream(teacher, FEW), lineage, [2])
    moved = student.state_dict()["model.layers.2.mlp.down_proj.weight"] - before["model.layers.2.mlp.down_proj.weight"]
    assert moved.norm() < 1e-2


def test_ridge_leaves_weights_that_no_strength_makes_better_on_held_out_text():
    student, teacher, lineage = _merged()
    before = weights_of(student)
    refit = RidgeRefit(layers="merged", projections="mlp", strengths=[1e-9, 1e-8], held_out=0.5)
    refit.refit(Stream(student, FEW), Stream(teacher, FEW), lineage, [2])
    assert_same(student, before)


def test_ridge_fits_attention_towards_the_ancestor_that_the_student_is_nearest_to():
    teacher = tiny_llama(5)
    with torch.no_grad():
        for layer in (teacher.model.layers[1], teacher.model.layers[2]):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    student = surgery.second_view(teacher)
    history = MergeHistory(5, (MergeStep((1, 2, 3), spec_of(Drop("last")), (0.0, 0.0, 1.0)),))
    surgery.apply(student, history.steps[0])
    before = student.model.layers[1].self_attn.o_proj.weight.clone()
    _refit(RidgeRefit(), student, teacher, history.lineage)
    assert torch.equal(student.model.layers[1].self_attn.o_proj.weight, before)


@pytest.mark.parametrize("group", [(1, 2), (1, 2, 3, 4)])
def test_ridge_holds_the_sums_of_one_regression_however_many_layers_merged(
    monkeypatch: pytest.MonkeyPatch, group: tuple[int, ...]
):
    made = []
    monkeypatch.setattr(Sums, "zeros", lambda *shape: made.append(shape) or ZEROS(*shape))
    student, teacher, lineage = _merged(FIRST, group)
    _refit(RidgeRefit(layers="merged"), student, teacher, lineage)
    assert len(made) == 4, "fitted and held out, for the attention's projection and the MLP's"


def test_ridge_ignores_masked_tokens():
    results = []
    for filler in (5, 50):
        student, teacher, lineage = _merged()
        batches: list[Batch] = []
        for batch in BATCHES:
            ids, mask = batch["input_ids"].clone(), torch.ones_like(batch["input_ids"])
            mask[:, 40:] = 0
            ids[:, 40:] = filler
            batches.append({"input_ids": ids, "attention_mask": mask})
        WEAK.refit(Stream(student, batches), Stream(teacher, batches), lineage, [2])
        results.append(weights_of(student))
    assert_same(*results)


def _length(states: list[Tensor]) -> float:
    return float(torch.cat([state.norm(dim=-1).flatten() for state in states]).mean())


def test_ridge_passes_a_batch_that_is_padding_alone():
    """Such as an empty line, padded to a length beyond which batches are not joined."""
    text: list[Batch] = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in token_batches(3, 1, 600)]
    empty = {"input_ids": text[0]["input_ids"], "attention_mask": torch.zeros_like(text[0]["input_ids"])}
    refitted = []
    for batches in (text, [*text, empty]):
        student, teacher, lineage = _merged()
        refit = RidgeRefit(layers="merged", strengths=[0.1])
        refit.refit(Stream(student, batches), Stream(teacher, batches), lineage, [2])
        refitted.append(student)
    assert_same(refitted[1], weights_of(refitted[0]))


@pytest.mark.gpu
def test_ridge_takes_masks_to_where_the_model_is():
    batches: list[Batch] = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in BATCHES]
    student, teacher, lineage = _merged()
    RidgeRefit().refit(Stream(student.cuda(), batches), Stream(teacher.cuda(), batches), lineage, [2])
    other, original, _ = _merged()
    RidgeRefit().refit(Stream(other, batches), Stream(original, batches), lineage, [2])
    ours, theirs = (layers_of(model)[2].mlp.down_proj.weight.detach().cpu() for model in (student, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


def test_magnitude_compensation_gives_the_stream_its_length_back():
    student, teacher, lineage = _merged(Drop("first"), (1, 2, 3))
    factor = _length(_states(teacher)[3]) / _length(_states(student)[1])
    expected = [layers_of(student)[place].mlp.down_proj.weight / factor for place in (2, 3)]
    first = layers_of(student)[1].mlp.down_proj.weight.detach().clone()
    _refit(MagnitudeCompensation(), student, teacher, lineage)
    for place, weight in zip((2, 3), expected, strict=True):
        torch.testing.assert_close(layers_of(student)[place].mlp.down_proj.weight, weight)
    torch.testing.assert_close(layers_of(student)[1].mlp.down_proj.weight, first)


@pytest.mark.parametrize("second", [(2, 3), (1, 2)], ids=["behind", "takes in the first"])
def test_magnitude_compensation_again_replaces_the_factor_of_an_earlier_merge(second: tuple[int, int]):
    student, teacher, lineage = _merged(Drop("first"), (1, 2))
    _refit(MagnitudeCompensation(), student, teacher, lineage)
    step = MergeStep(second, spec_of(Drop("first")), (1.0, 0.0))
    surgery.apply(student, step)
    lineage = MergeHistory(6, (MergeStep((1, 2), spec_of(FIRST), (1.0, 0.0)), step)).lineage
    base = step.base
    factor = _length(_states(teacher)[lineage[base][-1]]) / _length(_states(student)[base])
    MagnitudeCompensation().refit(Stream(student, BATCHES), Stream(teacher, BATCHES), lineage, [base])
    for place in range(base + 1, 4):
        original = layers_of(teacher)[lineage[place][0]].mlp.down_proj.weight
        torch.testing.assert_close(layers_of(student)[place].mlp.down_proj.weight, original / factor)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_magnitude_compensation_scales_the_norm_where_one_follows_the_projection(family: Family):
    student, teacher, lineage = _merged(FIRST, (1, 2), family=family)
    layout = layout_of(student.config)
    name = f"{layout.mlp.norm_after}.weight"
    factor = _length(_states(teacher)[2]) / _length(_states(student)[1])
    expected = (layers_of(student)[2].get_parameter(name) + layout.norm_offset) / factor - layout.norm_offset
    _refit(MagnitudeCompensation(), student, teacher, lineage)
    torch.testing.assert_close(layers_of(student)[2].get_parameter(name), expected)


def test_magnitude_compensation_passes_a_layer_whose_attention_adds_nothing():
    student, teacher, lineage = _merged(FIRST, (1, 2))
    for model, place in ((student, 2), (teacher, 3)):
        layers_of(model)[place].self_attn.o_proj.weight.data.zero_()
    factor = _length(_states(teacher)[2]) / _length(_states(student)[1])
    expected = layers_of(student)[2].mlp.down_proj.weight / factor
    _refit(MagnitudeCompensation(), student, teacher, lineage)
    torch.testing.assert_close(layers_of(student)[2].mlp.down_proj.weight, expected)


def test_refit_restores_the_mode_of_every_module():
    student, teacher, lineage = _merged()
    student.train()
    student.model.layers[0].eval()  # type: ignore[union-attr, operator]
    before = [module.training for module in student.modules()]
    _refit(WEAK, student, teacher, lineage)
    assert [module.training for module in student.modules()] == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", "all"),
        ("layers", ["after"]),
        ("projections", "attention"),
        *(
            ("strengths", wrong)
            for wrong in ([], [0.0], "abc", 5, None, [None], ["1"], [inf], [nan], [10**400], [True], {"1": 2})
        ),
        *(("held_out", wrong) for wrong in (1.0, 0, "x", None, True, nan)),
    ],
)
def test_ridge_refuses_what_it_cannot_do(field: str, value: object):
    with pytest.raises(InputError, match=f"^RidgeRefit: {field}="):
        RidgeRefit(**{field: value})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Doubled(Refit):
    """A user's own refit, which takes no care of gradients."""

    def refit(self, student: Stream, teacher: Stream, lineage: Lineage, merged: Sequence[int]) -> None:
        for place in merged:
            weight = layers_of(student.model)[place].mlp.down_proj.weight
            doubled = 2 * weight
            assert not doubled.requires_grad
            weight.data = doubled


def test_refit_of_the_users_own_is_called_without_gradients():
    model, merged = tiny_llama(), tiny_llama()
    execute(merged, MergeHistory(6, (MergeStep((2, 3), spec_of(FIRST), (0.5, 0.5)),)))
    step = MergeStep((2, 3), spec_of(FIRST), (0.5, 0.5), refit=spec_of_refit(Doubled()))
    execute(model, MergeHistory(6, (step,)), BATCHES)
    expected, name = weights_of(merged), "model.layers.2.mlp.down_proj.weight"
    assert_same(weights_of(model), expected | {name: 2 * expected[name]})


def test_key_beside_the_arguments_is_refused():
    with pytest.raises(InputError, match=r"refit class_path='RidgeRefit' has 'layers' beside it, .* under init_args"):
        from_spec({"class_path": "RidgeRefit", "layers": "merged"})


def test_ridge_needs_two_sequences_to_choose_a_strength_and_says_so_before_anything_is_merged():
    student = tiny_llama()
    one: list[Batch] = [{"input_ids": token_batches(1, 1, 16)[0]}]
    history = MergeHistory(6, (MergeStep((2, 3), spec_of(FIRST), (1.0, 0.0), refit=spec_of_refit(RidgeRefit())),))
    with pytest.raises(InputError, match="calibration_blocks"):
        collapse(student, one, target_depth=4, refit=RidgeRefit())
    with pytest.raises(InputError, match="calibration_blocks"):
        execute(student, history, one)
    assert len(layers_of(student)) == 6
    collapse(student, one, target_depth=5, refit=WEAK)


def test_ridge_writes_what_the_stream_lacks_where_branches_are_scaled_on_their_way():
    # Granite adds 0.25 times what a branch writes: the change of the weights is four times that.
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 97, "initializer_range": 0.2}
    heads = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = GraniteConfig(**sizes, **heads, residual_multiplier=0.25, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(config)
    student, step = deepcopy(teacher), MergeStep((2, 3), spec_of(FIRST), (1.0, 0.0))
    surgery.apply(student, step)
    refit, lineage = RidgeRefit(layers="merged", projections="mlp", strengths=[1e-6]), MergeHistory(6, (step,)).lineage
    moved = []
    for _ in range(2):
        before = layers_of(student)[2].mlp.down_proj.weight.detach().clone()
        refit.refit(Stream(student, BATCHES), Stream(teacher, BATCHES), lineage, [2])
        moved.append((layers_of(student)[2].mlp.down_proj.weight - before).norm().item())
    assert moved[1] < 1e-2 * moved[0]
