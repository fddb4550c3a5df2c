"""Weights in 8 and 4 bit: unpacked, merged and packed again, shared with the teacher, and gone in the export."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lcprune import AtSteps, DistillationModule, Drop, FixedPlan, Logits, Lora, ProgressiveCollapse, WeightedAverage
from lcprune.cli import main
from lcprune.delivery.export import export
from lcprune.delivery.figures import model_figures
from lcprune.distillation import adapters, quantized
from lcprune.distillation.checkpoint import load_student
from lcprune.distillation.pair import Storage, load_pair
from lcprune.distillation.teacher import head_of, load
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.calibration import evaluating
from lcprune.merging.lineage import MergeStep
from lcprune.merging.operators import spec_of
from tests import builders
from tests.cli.recipe import recipe, text_file, write
from tests.distillation import runs
from tests.marks import slow

QLORA = Lora(rank=4, base="nf4")
CPU = torch.device("cpu")


def whole_blocks(*, tied: bool = True) -> PreTrainedModel:
    """A tiny Llama whose projections have whole blocks of 64 inputs."""
    config = builders.tiny_config(tied=tied)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save_tiny(tmp_path_factory.mktemp("blocks") / "model", whole_blocks())


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with evaluating(model):
        return model(batch["input_ids"]).logits


def largest_gap(weight: Tensor) -> Tensor:
    """Half the widest gap between two of nf4's sixteen values, per block of 64, as wide as the weight."""
    return 0.153 * weight.reshape(-1, 64).abs().amax(1, keepdim=True).expand(-1, 64).reshape(weight.shape)


def test_what_is_not_packed_needs_no_bitsandbytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)  # an import of it fails
    quantized.restore(whole_blocks(), {})


def test_packed_weights_are_within_half_a_step_and_packing_them_again_changes_nothing(folder: Path):
    exact, packed = load(str(folder), "float32"), load(str(folder), "float32", packed="nf4")
    names = quantized.packed_names(packed)
    assert len(names) == 6 * 7
    for name in names:
        linear, weight = packed.get_submodule(name), exact.get_parameter(f"{name}.weight")
        once = quantized.unpacked(linear).weight.detach()  # type: ignore[arg-type]
        assert ((once - weight).abs() <= largest_gap(weight)).all()
        quantized.repack(linear, once)  # type: ignore[arg-type]
        assert quantized.unpacked(linear).weight.equal(once)  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", ["int8", "nf4"])
def test_packed_model_is_counted_by_its_parameters_not_by_its_bytes(folder: Path, packed: quantized.Packed):
    exact, model = load(str(folder), "float32"), load(str(folder), "float32", packed=packed)
    assert model_figures(model, folder) == model_figures(exact, folder)
    assert (quantized.holds_packed(model), quantized.holds_packed(exact)) == (True, False)


@pytest.mark.parametrize("packed", ["int8", "nf4"])
def test_embeddings_and_head_are_not_packed(tmp_path: Path, packed: quantized.Packed, batch: dict[str, Tensor]):
    exact = whole_blocks(tied=False)
    model = load(str(builders.save_tiny(tmp_path, exact)), "float32", packed=packed)
    assert head_of(model).weight_VD.equal(exact.lm_head.weight)
    assert model.get_input_embeddings().weight.equal(exact.get_input_embeddings().weight)
    difference = logits(model, batch) - logits(exact, batch)
    assert difference.norm() < {"int8": 0.1, "nf4": 0.8}[packed] * logits(exact, batch).norm()


def test_rows_of_broken_blocks_are_refused_where_they_would_be_computed_wrongly(tiny_folder: Path):
    with pytest.raises(InputError, match=r"q_proj has 32 inputs, no multiple of 64, .*: use int8"):
        load(str(tiny_folder), "float32", packed="nf4")


def test_merge_of_packed_layers_is_off_by_the_last_packing_alone(folder: Path):
    student = load(str(folder), "float32", packed="nf4")
    adapters.attach(student, QLORA)
    step = MergeStep((2, 3), spec_of(WeightedAverage()), (0.25, 0.75))
    with adapters.plain(student):
        before = [layer.state_dict() for layer in student.model.layers]
        surgery.apply(student, step)
        merged = {name: weight.clone() for name, weight in student.model.layers[2].state_dict().items()}
    with adapters.plain(student):
        after = [layer.state_dict() for layer in student.model.layers]
        assert len(after) == 5
        for name, weight in merged.items():
            expected = 0.25 * before[2][name] + 0.75 * before[3][name] if "proj" in name else before[2][name]
            torch.testing.assert_close(weight, expected)
            assert ((after[2][name] - weight).abs() <= (largest_gap(weight) if "proj" in name else 0)).all()
        for ours, theirs in ((0, 0), (1, 1), (3, 4), (4, 5)):
            assert runs.equal(after[ours], before[theirs])
    assert len(quantized.own_weights(student)) == 7


def test_teacher_and_student_in_4_bit_are_one_copy(folder: Path):
    teacher, student = load_pair(str(folder), Storage("float32", "nf4"), Storage("float32", "nf4"), CPU)
    theirs = [parameter.data_ptr() for parameter in teacher.parameters()]
    assert [parameter.data_ptr() for parameter in student.parameters()] == theirs
    state = [vars(weight)["quant_state"] for weight in quantized.packed_weights(student).values()]
    assert state == [vars(weight)["quant_state"] for weight in quantized.packed_weights(teacher).values()]


def merges() -> ProgressiveCollapse:
    plan = FixedPlan([[2, 3], [4, 5]])
    return ProgressiveCollapse(AtSteps({0: 5, 3: 4}), planner=plan, operator=WeightedAverage())


def run(folder: Path, text: Path, root: Path, *callbacks: Callback, resume: bool = False, **settings: object):
    torch.manual_seed(123 if resume else 0)
    usual = {"train": "lora_after_merge", "lora": QLORA, "teacher_dtype": "nf4", "lr_scheduler": None}
    module = runs.student_of(folder, **usual | settings)
    trainer = runs.trainer_for(root, *callbacks, merges(), runs.checkpoints_in(root), max_steps=5, limit_val_batches=0)
    checkpoint = str(root / "last.ckpt") if resume else None
    trainer.fit(module, datamodule=runs.data_for(folder, text), ckpt_path=checkpoint)
    return module


@pytest.mark.parametrize(
    ("settings", "prefix_runs_once"),
    [
        ({}, True),
        ({"teacher_dtype": "int8"}, False),
        ({"teacher_dtype": "auto"}, False),
        ({"teacher_dtype": "nf4", "lora": None, "train": "after_merge"}, False),
        ({"teacher_dtype": "int8", "lora": None, "train": "all"}, False),
    ],
)
def test_run_leaves_the_teacher_as_it_was_and_checkpoint_and_export_are_the_student(
    folder: Path, text: Path, tmp_path: Path, batch: dict[str, Tensor], settings: dict, prefix_runs_once: bool
):
    seen: list[dict[str, Tensor]] = []

    class Look(Callback):
        def on_train_start(self, trainer: object, pl_module: DistillationModule) -> None:
            assert pl_module.teacher is not None
            seen.append(runs.weights_of(pl_module.teacher.model))

    module = run(folder, text, tmp_path, Look(), **settings)
    assert module.teacher is not None
    assert runs.equal(runs.weights_of(module.teacher.model), seen[0])
    assert module._prefix_is_original == prefix_runs_once
    ours = logits(module.student, batch)
    loaded, _ = load_student(tmp_path / "last.ckpt")
    adapters.fold(module.student)
    tokenizer = builders.tiny_tokenizer()
    export(module.student, tmp_path / "out", tokenizer=tokenizer, history=module.history)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in plain.config.to_dict()
    for model in (loaded, plain):
        assert all(parameter.is_floating_point() for parameter in model.parameters())
        torch.testing.assert_close(logits(model, batch), ours, rtol=1e-4, atol=5e-5)


def test_checkpoint_holds_adapters_and_merged_layers_only(folder: Path, text: Path, tmp_path: Path):
    run(folder, text, tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any(".base_layer." in name for name in saved["state_dict"])
    assert {name.split(".")[2] for name in saved["lcprune"]["packed"]} == {"2", "3"}


@pytest.mark.parametrize("killed_at", [3, *slow(2, 4)])
def test_resumed_run_ends_like_the_whole_one(folder: Path, text: Path, tmp_path: Path, killed_at: int):
    def stop() -> None:
        raise RuntimeError("stop")

    whole = run(folder, text, tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        run(folder, text, tmp_path, runs.Interrupt(killed_at, "after", stop))
    resumed = run(folder, text, tmp_path, resume=True)
    assert runs.equal(runs.weights_of(resumed.student), runs.weights_of(whole.student))
    for name, packed in quantized.own_weights(whole.student).items():
        assert runs.equal(quantized.own_weights(resumed.student)[name], packed)


@pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")
def test_recipe_trains_merges_and_exports_on_a_cpu(folder: Path, tmp_path: Path):
    small = recipe(folder, text_file(tmp_path), tmp_path / "run")
    path = write(tmp_path, {name: small[name] for name in ("trainer", "data")})
    ours = str(Path(__file__).parents[2] / "recipes" / "qlora.yaml")
    schedule = ["--collapse.schedule.target_depth", "4", "--collapse.schedule.last", "3"]
    phases = '[{"objective": [{"class_path": "Local"}], "steps": 1}, {"objective": [{"class_path": "Logits"}]}]'
    model = ["--model.teacher", str(folder), "--model.phases", phases]
    assert main(["fit", "--config", ours, "--config", str(path), *schedule, *model]) == 0
    out = tmp_path / "run" / "student"
    student = AutoModelForCausalLM.from_pretrained(out)
    assert student.config.num_hidden_layers == 4
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    again = tmp_path / "again"
    checkpoint = next((tmp_path / "run").rglob("last.ckpt"))
    assert main(["export", str(checkpoint), "--out", str(again)]) == 0
    assert AutoModelForCausalLM.from_pretrained(again).config.num_hidden_layers == 4


def test_family_that_stores_projections_the_other_way_round_is_refused(tmp_path: Path):
    gpt2 = builders.save_tiny(tmp_path, builders.tiny_llama(model_type="gpt2"))
    module = runs.student_of(gpt2, objective=[Logits()], train="lora", lora=QLORA)
    with pytest.raises(InputError, match="use base: full"):
        module.configure_model()


def test_plain_step_of_a_merge_that_drops_keeps_the_bytes(folder: Path):
    student = load(str(folder), "float32", packed="nf4")
    adapters.attach(student, QLORA)
    kept = student.model.layers[3].mlp.down_proj.base_layer.weight.detach().clone()
    with adapters.plain(student):
        surgery.apply(student, MergeStep((2, 3), spec_of(Drop("last")), (0.5, 0.5)))
    assert student.model.layers[2].mlp.down_proj.base_layer.weight.equal(kept)
