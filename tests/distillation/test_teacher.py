"""The student as a second view of the teacher: what they share, what they do not, and that the teacher stays."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lcprune import DistillationModule, Labels, Logits
from lcprune.distillation.passes import Wanted, forward
from lcprune.distillation.teacher import DtypeName, Teacher, cast, head_of, load, second_view
from lcprune.distillation.trained import own
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeStep
from tests import builders
from tests.distillation import runs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", builders.FAMILIES)
def test_second_view_shares_storage_under_parameters_of_its_own(family: builders.Family, tied: bool):
    model = builders.tiny_llama(tied=tied, model_type=family)
    view = second_view(model)
    ours, theirs = dict(view.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    assert not {id(parameter) for parameter in ours.values()} & {id(parameter) for parameter in theirs.values()}
    assert (view.get_output_embeddings().weight is view.get_input_embeddings().weight) == tied
    buffers = dict(model.named_buffers())
    assert buffers
    for name, buffer in view.named_buffers():
        assert buffer.equal(buffers[name])
        assert buffer is not buffers[name]
    assert view.config is not model.config
    assert not {id(module) for module in view.modules()} & {id(module) for module in model.modules()}


def test_second_view_computes_the_same_before_and_apart_after_surgery(batch: dict[str, Tensor]):
    model = builders.tiny_llama()
    view, ids = second_view(model), batch["input_ids"]
    before = model(ids).logits
    assert view(ids).logits.equal(before)
    surgery.apply(view, MergeStep((1, 2), {"class_path": "Rdsc"}, (0.5, 0.5)))
    assert view.config.num_hidden_layers == 5
    assert model.config.num_hidden_layers == len(model.model.layers) == 6
    assert model(ids).logits.equal(before)
    assert not view(ids).logits.equal(before)
    # transformers' own capture of states still works on both
    assert len(view(ids, output_hidden_states=True).hidden_states) == 6
    assert len(model(ids, output_hidden_states=True).hidden_states) == 7


def test_own_gives_storage_and_keeps_identity():
    model = builders.tiny_llama()
    view = second_view(model)
    parameter = view.model.norm.weight
    own(parameter)
    assert parameter is view.model.norm.weight
    parameter.data.zero_()
    assert model.model.norm.weight.any()


def test_teacher_box_copies_to_itself_and_is_frozen():
    box = Teacher(builders.tiny_llama().train())
    assert copy.deepcopy(box) is box
    assert copy.deepcopy({"inside": [box]})["inside"][0] is box
    assert not any(parameter.requires_grad for parameter in box.model.parameters())
    assert not any(module.training for module in box.model.modules())


def test_teacher_states_carry_no_gradient_and_its_own_dtype(batch: dict[str, Tensor]):
    box = Teacher(builders.tiny_llama())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = box(batch, Wanted(outputs=(0, 4)))
    assert states.last is not None
    assert states.last.dtype == torch.float32
    assert not states.last.requires_grad
    assert sorted(states.layers) == [0, 4]
    assert not box.model.model.layers[4]._forward_hooks


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_last_state_times_head_is_the_logits(family: builders.Family, batch: dict[str, Tensor]):
    model = builders.tiny_llama(tied=False, model_type=family)
    with torch.no_grad():
        states = forward(model, batch, Wanted(outputs=range(6)))
        torch.testing.assert_close(head_of(model)(states.last), model(batch["input_ids"]).logits)
        hidden = model(batch["input_ids"], output_hidden_states=True).hidden_states
    for layer in range(5):
        assert states.layers[layer].equal(hidden[layer + 1])


def test_load_refuses_an_unknown_family_before_reading_weights(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(InputError, match="mamba"):
        load(str(tmp_path), "float32")


def test_load_refuses_a_folder_without_weights_in_one_sentence(tmp_path: Path):
    builders.tiny_config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.teacher: .*neither model\.safetensors") as caught:
        load(str(tmp_path), "float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("computed", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", builders.ALL_FAMILIES)
def test_cast_model_has_the_buffers_of_one_loaded_in_that_dtype(
    family: builders.Family, computed: DtypeName, tmp_path: Path
):
    teacher = str(builders.save_tiny(tmp_path, builders.tiny_llama(model_type=family)))
    model = load(teacher, computed)
    surgery.apply(model, MergeStep((1, 2), {"class_path": "Drop"}, (0.5, 0.5)))
    cast(model, torch.float32)
    exact = dict(load(teacher, "float32").named_buffers())
    for name, buffer in model.named_buffers():
        assert buffer.dtype == exact[name].dtype
        assert buffer.equal(exact[name])


def configured(teacher: Path, **settings: object) -> DistillationModule:
    module = runs.student_of(teacher, **settings)
    module.configure_model()
    return module


def test_module_does_not_register_its_teacher(tiny_folder: Path):
    module = configured(tiny_folder)
    assert module.teacher is not None
    inside = {id(parameter) for parameter in module.parameters()}
    assert not inside & {id(parameter) for parameter in module.teacher.model.parameters()}
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
    assert {name for name, _ in module.named_children()} == {"student", "held_out"}


def shared(module: DistillationModule) -> set[str]:
    """Names of parameters that student and teacher hold in the same memory."""
    assert module.teacher is not None
    theirs = {parameter.data_ptr() for parameter in module.teacher.model.parameters()}
    return {name for name, parameter in module.student.named_parameters() if parameter.data_ptr() in theirs}


@pytest.mark.parametrize("teacher_dtype", ["auto", "float32"])
def test_module_shares_with_the_teacher_exactly_what_is_not_trained(tiny_folder: Path, teacher_dtype: str):
    module = configured(tiny_folder, train="layers", teacher_dtype=teacher_dtype)
    frozen = {name for name, parameter in module.student.named_parameters() if not parameter.requires_grad}
    assert frozen == shared(module) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert module.student.lm_head.weight is module.student.model.embed_tokens.weight
    assert shared(configured(tiny_folder, train="all")) == set()


def test_teacher_of_another_dtype_shares_nothing_and_keeps_its_rotary_frequencies(tiny_folder: Path):
    module = configured(tiny_folder, teacher_dtype="bfloat16", train="layers")
    assert module.teacher is not None
    assert {parameter.dtype for parameter in module.teacher.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in module.student.parameters()} == {torch.float32}
    assert shared(module) == set()
    exact = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).model.rotary_emb.inv_freq
    assert exact.dtype == torch.float32
    for model in (module.teacher.model, module.student):
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert model.model.rotary_emb.inv_freq.equal(exact)
    assert module.teacher.model.lm_head.weight is module.teacher.model.model.embed_tokens.weight


@pytest.mark.parametrize("train", ["all", "layers"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_teacher_is_bitwise_the_same_after_training_with_merges(
    tiny_folder: Path, text: Path, tmp_path: Path, precision: str, train: str
):
    module = runs.student_of(tiny_folder, train=train, objective=[Logits(), Labels(0.5)])
    module._trainer = trainer = runs.trainer_for(tmp_path, runs.two_merges(), precision=precision, max_steps=8)
    module.configure_model()
    assert module.teacher is not None
    before = runs.weights_of(module.teacher.model)
    untouched = runs.weights_of(module)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    assert module.history.depth == 4
    assert runs.equal(runs.weights_of(module.teacher.model), before)
    layer = module.student.model.layers[0]
    assert not any(
        parameter.equal(untouched[f"student.model.layers.0.{name}"]) for name, parameter in layer.named_parameters()
    )
    low = torch.float32 if precision == "32-true" else torch.bfloat16
    assert {parameter.dtype for parameter in module.teacher.model.parameters()} == {low}
    student = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {parameter.dtype for parameter in module.student.parameters()} == {student}
    for model in (module.teacher.model, module.student):
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert model.model.rotary_emb.original_inv_freq.dtype == torch.float32
    rotary = AutoModelForCausalLM.from_pretrained(tiny_folder).model.rotary_emb.inv_freq
    assert module.student.model.rotary_emb.inv_freq.equal(rotary)
