"""Which layers are taught by which, what counts, and that the loss is the sum that is written down."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from lcprune.distillation.levels import Boundary, Labels, Level, Local, Logits, check
from lcprune.distillation.losses import boundary_loss
from lcprune.distillation.objectives import Forward, next_tokens, objective, run, scored_positions, taught_layers
from lcprune.distillation.teacher import Teacher, second_view
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, spec_of
from tests import builders
from tests.builders import Family

UNMERGED = MergeHistory(6)
MERGED = MergeHistory(6, (MergeStep((1, 2, 3), {"class_path": "Drop"}, (1.0, 0.0, 0.0)),))
EVERY: tuple[Level, ...] = (Logits(0.7, 2.0), Boundary(0.5, "mse", "all"), Labels(0.3))


def passes(
    batch: Mapping[str, Tensor], history: MergeHistory, levels: tuple[Level, ...]
) -> tuple[Forward, PreTrainedModel, PreTrainedModel]:
    """Both passes over a batch, and the two models."""
    model = builders.tiny_llama()
    student = second_view(model)
    surgery.apply_all(student, history.steps)
    return run(levels, batch, student, Teacher(model), history.lineage), student, model


@pytest.mark.parametrize(
    ("levels", "taught"),
    [
        ((Logits(),), ()),
        ((Logits(), Boundary()), (1,)),
        ((Boundary(layers="all"),), (0, 1, 2, 3)),
    ],
)
def test_taught_layers_follow_the_lineage(levels: tuple[Level, ...], taught: tuple[int, ...]):
    assert MERGED.lineage == ((0,), (1, 2, 3), (4,), (5,))
    assert taught_layers(levels, MERGED.lineage) == taught
    assert taught_layers((Boundary(),), UNMERGED.lineage) == ()


def test_next_tokens_are_the_labels_moved_by_one():
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, -100, 7]])}
    assert next_tokens(batch).tolist() == [[-100, 7, -100]]
    assert scored_positions(batch).tolist() == [[False, True, False]]
    assert next_tokens({"input_ids": batch["input_ids"]}).tolist() == [[6, 7, -100]]


def test_loss_is_the_sum_that_is_written_down(batch: dict[str, Tensor]):
    batch["labels"][0, :5] = -100
    both, student, teacher = passes(batch, MERGED, EVERY)
    terms = objective(EVERY, both, MERGED.lineage)
    keep = scored_positions(batch)
    assert keep.sum() == 2 * 15 - 4
    with torch.no_grad():
        student_logits = student(batch["input_ids"]).logits[keep]
        output = teacher(batch["input_ids"], output_hidden_states=True)
        theirs = (output.logits[keep] / 2).log_softmax(-1)
        ours = (student_logits / 2).log_softmax(-1)
        logits = 4 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
        labels = cross_entropy(student_logits, next_tokens(batch)[keep])
        # HF's hidden_states[l + 1] is the output of layer l, for all but the last
        mine = student(batch["input_ids"], output_hidden_states=True).hidden_states
        pairs = [(both.student.layers[3], both.teacher.layers[5])]
        pairs += [(mine[s + 1], output.hidden_states[t + 1]) for s, t in ((0, 0), (1, 3), (2, 4))]
        relative = [((s - t)[keep].pow(2).sum(-1) / t[keep].pow(2).sum(-1)).mean() for s, t in pairs]
        boundary = torch.stack(relative).mean()
    torch.testing.assert_close(terms["logits"], logits)
    torch.testing.assert_close(terms["labels"], labels)
    torch.testing.assert_close(terms["boundary"], boundary)
    torch.testing.assert_close(terms["loss"], 0.7 * logits + 0.5 * boundary + 0.3 * labels)
    assert terms["loss"].requires_grad
    assert not any(terms[name].requires_grad for name in ("logits", "labels", "boundary"))


def test_merged_layer_is_taught_by_where_its_last_ancestor_ended(batch: dict[str, Tensor]):
    levels = (Boundary(),)
    both, student, teacher = passes(batch, MERGED, levels)
    with torch.no_grad():
        goal = teacher(batch["input_ids"], output_hidden_states=True).hidden_states[4]
        mine = student(batch["input_ids"], output_hidden_states=True).hidden_states[2]
        expected = (1 - cosine_similarity(mine, goal, dim=-1))[:, :-1].mean()
    torch.testing.assert_close(objective(levels, both, MERGED.lineage)["loss"], expected)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_unmerged_student_has_nothing_to_learn(batch: dict[str, Tensor], kind: str):
    levels = (Logits(), Boundary(distance=kind, layers="all"))  # type: ignore[arg-type]
    both, _, _ = passes(batch, UNMERGED, levels)
    terms = objective(levels, both, UNMERGED.lineage)
    assert terms["logits"].item() == pytest.approx(0, abs=1e-6)
    assert terms["boundary"].item() == pytest.approx(0, abs=1e-6)
    both, _, _ = passes(batch, MERGED, levels)
    terms = objective(levels, both, MERGED.lineage)
    assert terms["logits"].item() > 0.01
    assert terms["boundary"].item() > 0.01


def test_boundary_that_is_scaled_to_logits_without_a_difference_is_zero(batch: dict[str, Tensor]):
    levels = (Logits(), Boundary(layers="all", distance="mse", scale="logits"))
    both, _, _ = passes(batch, UNMERGED, levels)
    assert objective(levels, both, UNMERGED.lineage)["loss"].item() == pytest.approx(0, abs=1e-6)


def test_labels_of_minus_100_never_count(batch: dict[str, Tensor]):
    # Causal: what stands behind the last scored label can change nothing.
    batch["labels"][:, 9:] = -100
    first = objective(EVERY, passes(batch, MERGED, EVERY)[0], MERGED.lineage)
    batch["input_ids"][:, 9:] = 3
    second = objective(EVERY, passes(batch, MERGED, EVERY)[0], MERGED.lineage)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=name)


def test_batch_without_a_scored_label_gives_zero_with_a_gradient(batch: dict[str, Tensor]):
    batch["labels"][:] = -100
    both, student, _ = passes(batch, MERGED, EVERY)
    loss = objective(EVERY, both, MERGED.lineage)["loss"]
    assert loss.item() == 0
    loss.backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("level", EVERY)
def test_terms_are_those_of_the_levels_named(batch: dict[str, Tensor], level: Level):
    terms = objective((level,), passes(batch, MERGED, (level,))[0], MERGED.lineage)
    name = type(level).__name__.lower()
    assert set(terms) == {"loss", name}
    torch.testing.assert_close(terms["loss"], level.weight * terms[name])


def test_boundary_alone_can_be_stepped_before_the_first_merge(batch: dict[str, Tensor]):
    both, _, _ = passes(batch, UNMERGED, (Boundary(),))
    loss = objective((Boundary(),), both, UNMERGED.lineage)["loss"]
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("levels", [(), (Logits(), Logits(0.5)), (Boundary(), Logits(), Boundary(layers="all"))])
def test_check_refuses_no_level_and_the_same_twice(levels: tuple[Level, ...]):
    with pytest.raises(InputError, match="objective="):
        check(levels)


class Own(Level):
    """A level that nothing here knows how to compute."""

    weight = 1.0


@pytest.mark.parametrize("levels", [[Own()], [Logits(), Own()], [Logits], Logits(), None])
def test_check_refuses_what_is_no_list_of_known_levels(levels: object):
    with pytest.raises(InputError, match=r"objective=.* must be a list of levels"):
        check(levels)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Logits, Boundary, Labels])
@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_level_refuses_a_weight_that_is_not_positive(kind: type[Level], weight: float):
    with pytest.raises(InputError, match=f"weight={weight} of {kind.__name__}"):
        kind(weight)  # type: ignore[call-arg]


def test_logits_refuse_a_temperature_that_is_not_positive():
    with pytest.raises(InputError, match="temperature=0"):
        Logits(temperature=0)


@pytest.mark.parametrize("wrong", [{"distance": "l1"}, {"layers": "some"}])
def test_boundary_refuses_a_word_it_does_not_know(wrong: dict[str, str]):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Boundary(**wrong)  # type: ignore[arg-type]


def test_local_gives_the_merged_layer_the_stream_before_its_ancestors(batch: dict[str, Tensor]):
    batch["labels"][0, :5] = -100
    both, student, teacher = passes(batch, MERGED, (Local(),))
    terms = objective((Local(),), both, MERGED.lineage)
    with torch.no_grad():
        states = teacher(batch["input_ids"], output_hidden_states=True).hidden_states
        given, goal = states[1], states[4]
        position = teacher.model.rotary_emb(given, torch.arange(16)[None])
        output = student.model.layers[1](given, position_embeddings=position)
    keep = scored_positions(batch)
    torch.testing.assert_close(terms["loss"], boundary_loss(output[keep], goal[keep], kind="mse"))
    terms["loss"].backward()
    reached = {name.split(".")[2] for name, p in student.named_parameters() if p.grad is not None}
    assert reached == {"1"}


def test_local_on_the_students_own_inputs_keeps_the_gradient_in_the_layer(batch: dict[str, Tensor]):
    level = Local(inputs="student")
    history = MERGED.append(MergeStep((2, 3), {"class_path": "Drop"}, (1.0, 0.0)))
    both, student, _ = passes(batch, history, (level,))
    assert set(both.alone) == {1, 2}
    with torch.no_grad():
        mine = student(batch["input_ids"], output_hidden_states=True).hidden_states
    torch.testing.assert_close(both.alone[1], mine[2])  # what the layer makes of its own input is its output
    objective((level,), both, history.lineage)["loss"].backward()
    reached = {name.split(".")[2] for name, p in student.named_parameters() if p.grad is not None}
    assert reached == {"1", "2"}


def test_local_on_the_students_own_inputs_sends_no_gradient_to_the_layers_before(batch: dict[str, Tensor]):
    gradients = []
    for levels in ((Labels(),), (Labels(), Local(inputs="student"))):
        both, student, _ = passes(batch, MERGED, levels)
        objective(levels, both, MERGED.lineage)["loss"].backward()
        gradients.append(student.model.layers[0].mlp.down_proj.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2"])
def test_local_runs_a_merged_layer_as_the_kind_that_it_has_become(batch: dict[str, Tensor], family: Family):
    model, passing_on = (builders.tiny_llama(model_type=family) for _ in range(2))
    layout = layout_of(model.config)
    kinds = [layout.kind_of(model.config, place) for place in range(6)]
    base = next(place for place in range(5) if kinds[place] != kinds[place + 1])
    history = MergeHistory(6, (MergeStep((base, base + 1), spec_of(Drop("last")), (0.0, 1.0)),))
    student = second_view(model)
    surgery.apply(student, history.steps[0])
    both = run((Local(),), batch, student, Teacher(model), history.lineage)
    # What the last member, which is left, makes of the stream before the first: as if that had passed it on.
    with torch.no_grad():
        first = layout.layers_of(passing_on)[base]
        for matrix in (first.self_attn.o_proj, first.mlp.down_proj):
            matrix.weight.zero_()
        expected = passing_on(batch["input_ids"], output_hidden_states=True).hidden_states[base + 2]
    torch.testing.assert_close(both.alone[base], expected)


def test_nothing_is_run_that_no_level_needs(batch: dict[str, Tensor]):
    def ran(*levels: Level) -> tuple[list[int], list[int]]:
        model = builders.tiny_llama()
        student = second_view(model)
        surgery.apply_all(student, MERGED.steps)
        seen: tuple[list[int], list[int]] = ([], [])
        for numbers, each in zip(seen, (model, student), strict=True):
            for index, layer in enumerate(each.model.layers):
                layer.register_forward_hook(lambda *_, index=index, numbers=numbers: numbers.append(index))
        objective(levels, run(levels, batch, student, Teacher(model), MERGED.lineage), MERGED.lineage)
        return seen

    assert ran(Labels()) == ([], [0, 1, 2, 3])
    assert ran(Logits()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3])
    assert ran(Boundary()) == ([0, 1, 2, 3], [0, 1])
    assert ran(Local()) == ([0, 1, 2, 3], [1])


def test_student_that_shares_its_prefix_has_the_same_loss_and_gradients(batch: dict[str, Tensor]):
    found = []
    for prefix in (0, 1):
        model = builders.tiny_llama()
        student = second_view(model)
        surgery.apply_all(student, MERGED.steps)
        student.requires_grad_(False)
        student.model.layers[1:].requires_grad_(True)
        terms = objective(EVERY, run(EVERY, batch, student, Teacher(model), MERGED.lineage, prefix), MERGED.lineage)
        terms["loss"].backward()
        found.append((terms["loss"].detach(), [p.grad for p in student.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("pad_left", [True, False])
def test_padding_changes_nothing(batch: dict[str, Tensor], pad_left: bool):
    levels: tuple[Level, ...] = (*EVERY, Local())
    plain = objective(levels, passes(batch, MERGED, levels)[0], MERGED.lineage)
    ids, pad = batch["input_ids"], torch.full((2, 5), 7)

    def beside(inner: Tensor, outer: Tensor) -> Tensor:
        return torch.cat([outer, inner] if pad_left else [inner, outer], 1)

    mask = beside(torch.ones_like(ids), torch.zeros_like(pad))
    # The first token of a text is nobody's target, and with padding before it would be.
    labels = batch["labels"].clone()
    labels[:, 0] = -100
    padded = {
        "input_ids": beside(ids, pad),
        "labels": beside(labels, torch.full_like(pad, -100)),
        "attention_mask": mask,
    }
    terms = objective(levels, passes(padded, MERGED, levels)[0], MERGED.lineage)
    for name, value in plain.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_boundary_fades_and_scales_with_the_logits(batch: dict[str, Tensor]):
    both, _, _ = passes(batch, MERGED, EVERY)
    half = (Logits(), Boundary(0.8, final_weight=0.0))
    terms = objective(half, both, MERGED.lineage, progress=0.75)
    torch.testing.assert_close(terms["loss"], terms["logits"] + 0.2 * terms["boundary"])
    share = (Logits(), Boundary(0.5, scale="logits"))
    terms = objective(share, both, MERGED.lineage)
    torch.testing.assert_close(terms["loss"], 1.5 * terms["logits"])
    with pytest.raises(InputError, match="scale=logits needs Logits"):
        check((Boundary(scale="logits"),))
