"""Adapters: plain while layers merge, afresh afterwards, part of the weights at the end; the teacher sees nothing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lcprune import (
    AtSteps,
    Boundary,
    DistillationModule,
    FixedPlan,
    Local,
    Logits,
    Lora,
    Phase,
    ProgressiveCollapse,
    Rdsc,
    RidgeRefit,
    WeightedAverage,
)
from lcprune.delivery.export import export
from lcprune.distillation import adapters
from lcprune.distillation.checkpoint import load_student
from lcprune.distillation.passes import frozen_prefix
from lcprune.distillation.teacher import head_of, second_view
from lcprune.distillation.trained import is_adapter
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Calibration
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import spec_of
from tests import builders
from tests.distillation import runs
from tests.marks import slow

STEP = MergeStep((2, 3), spec_of(WeightedAverage()), (0.25, 0.75))
PLAIN = builders.tiny_llama()
SMALL = Lora(rank=4, alpha=8)
lora_student = partial(runs.student_of, train="lora", lora=SMALL)


def adapted(teacher: PreTrainedModel) -> PreTrainedModel:
    """A student that shares the teacher's weights and whose adapters have been trained, so to speak."""
    student = second_view(teacher)
    adapters.attach(student, SMALL)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in student.named_parameters():
        if is_adapter(name):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return student


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch["input_ids"]).logits


def named_adapters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}


@pytest.mark.parametrize("family", builders.ALL_FAMILIES)
def test_every_family_can_be_adapted_and_folded(family: builders.Family, batch: dict[str, Tensor]):
    teacher = builders.tiny_llama(model_type=family)
    student = adapted(teacher)
    theirs, ours = logits(teacher, batch), logits(student, batch)
    assert not torch.allclose(ours, theirs, atol=1e-2)
    layout = layout_of(student.config)
    projections = len(SMALL.projections(layout))
    assert len(named_adapters(student)) == 2 * projections * len(layout.layers_of(student))
    adapters.fold(student)
    torch.testing.assert_close(logits(student, batch), ours, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in student.named_parameters()] == [name for name, _ in teacher.named_parameters()]


def test_inside_the_block_the_student_is_plain_and_computes_the_same(batch: dict[str, Tensor]):
    teacher = builders.tiny_llama()
    student = adapted(teacher)
    before, ours = runs.weights_of(student), logits(student, batch)
    with adapters.plain(student) as changes:
        torch.testing.assert_close(logits(student, batch), ours, rtol=1e-5, atol=1e-5)
        names = list(Calibration(student, [batch]).layer_tensors(0))
        with surgery.trial(student, STEP):
            assert not torch.allclose(logits(student, batch), ours, atol=1e-2)
    assert names == [name for name, _ in layout_of(teacher.config).layers_of(teacher)[0].named_parameters()]
    assert runs.equal(runs.weights_of(student), before)
    assert changes.outcome == surgery.Outcome((), ())
    pointers = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert all(is_adapter(name) or weight.data_ptr() in pointers for name, weight in student.named_parameters())


@pytest.mark.parametrize("operator", [WeightedAverage(), Rdsc()])
def test_merge_of_adapted_layers_is_that_of_the_folded_ones(operator: WeightedAverage | Rdsc, batch: dict[str, Tensor]):
    step = MergeStep((2, 3), spec_of(operator), (0.25, 0.75))
    teacher = builders.tiny_llama()
    untouched = runs.weights_of(teacher)
    student, oracle = adapted(teacher), adapted(teacher)
    adapters.fold(oracle)
    surgery.apply(oracle, step)
    known = named_adapters(student)
    with adapters.plain(student) as changes:
        surgery.apply(student, step)
    torch.testing.assert_close(logits(student, batch), logits(oracle, batch), rtol=1e-4, atol=1e-4)
    layers = [name.split(".")[2] for name in known]
    assert [id(p) for p in changes.merged] == [id(p) for p, s in zip(known.values(), layers, strict=True) if s == "2"]
    assert [id(p) for p in changes.removed] == [id(p) for p, s in zip(known.values(), layers, strict=True) if s == "3"]
    ours = named_adapters(student)
    assert all(ours[name] is known[name] for name in ours if int(name.split(".")[2]) <= 2)
    assert all((".lora_B." in name) == (not weight.any()) for name, weight in ours.items() if name.split(".")[2] == "2")
    assert runs.equal(runs.weights_of(teacher), untouched)


def test_block_that_raises_leaves_the_student_as_it_was():
    student = adapted(builders.tiny_llama())
    before = runs.weights_of(student)
    with pytest.raises(RuntimeError, match="stop"), adapters.plain(student):
        raise RuntimeError("stop")
    assert runs.equal(runs.weights_of(student), before)


def merges(**settings: object) -> ProgressiveCollapse:
    plan = FixedPlan([[2, 3], [4, 5]])
    return ProgressiveCollapse(AtSteps({0: 5, 4: 4}), planner=plan, operator=WeightedAverage(), **settings)  # type: ignore[arg-type]


Fit = Callable[..., tuple[DistillationModule, Trainer]]


@pytest.fixture
def fit(tiny_folder: Path, text: Path, tmp_path: Path) -> Fit:
    def run(module: DistillationModule, *callbacks: Callback, steps: int = 6, checkpoint: Path | None = None):
        trainer = runs.trainer_for(tmp_path, *callbacks, max_steps=steps, limit_val_batches=0)
        data = runs.data_for(tiny_folder, text)
        trainer.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
        return module, trainer

    return run


@pytest.mark.parametrize("refit", [None, RidgeRefit()])
def test_run_trains_adapters_only_and_the_teacher_keeps_its_weights(
    fit: Fit, tiny_folder: Path, refit: RidgeRefit | None
):
    module = lora_student(tiny_folder)
    module.configure_model()
    assert module.teacher is not None
    theirs, ours = runs.weights_of(module.teacher.model), runs.weights_of(module.student)
    _, trainer = fit(module, merges(refit=refit))
    assert runs.equal(runs.weights_of(module.teacher.model), theirs)
    assert module.history.lineage == ((0,), (1,), (2, 3), (4, 5))
    trained = {id(p) for p in module.student.parameters() if p.requires_grad}
    assert trained == {id(p) for p in named_adapters(module.student).values()}
    assert trained == {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in trainer.optimizers[0].state} == trained
    # B = 0 lets no gradient through to A at first; two steps behind a merge both have moved.
    now = runs.weights_of(module.student)
    assert all(not now[name].equal(ours[name]) for name in now if is_adapter(name))
    first = [name for name in now if ".layers.0." in name and not is_adapter(name)]
    assert first
    assert all(now[name].equal(ours[name]) for name in first)


def test_phases_train_the_adapters_of_their_layers_and_the_prefix_runs_once(fit: Fit, tiny_folder: Path):
    moved: dict[int, set[int]] = {}
    prefixes: set[int] = set()

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
            self.before = runs.weights_of(pl_module.student)

        def on_train_batch_end(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
            now = runs.weights_of(pl_module.student)
            changed = {name for name in now if not now[name].equal(self.before[name])}
            assert all(is_adapter(name) for name in changed)
            moved[trainer.global_step] = {int(name.split(".")[2]) for name in changed}
            prefixes.add(frozen_prefix(pl_module.student, pl_module.history.lineage))

    phases = [Phase([Local()], steps=2), Phase([Logits(), Boundary(1.0)], train="lora_after_merge")]
    module = lora_student(tiny_folder, objective=None, phases=phases)
    fit(module, Watch(), ProgressiveCollapse(AtSteps({0: 5}), planner=FixedPlan([[2, 3]])), steps=4)
    assert moved == {1: {2}, 2: {2}, 3: {2, 3, 4}, 4: {2, 3, 4}}
    assert prefixes == {2}
    assert module._prefix_is_original


@pytest.mark.parametrize("killed_at", [4, *slow(3, 5)])
@pytest.mark.parametrize("train", ["lora", "lora_after_merge"])
def test_resumed_run_ends_like_the_whole_one(fit: Fit, tiny_folder: Path, tmp_path: Path, train: str, killed_at: int):
    def run(*callbacks: Callback, checkpoint: Path | None = None) -> DistillationModule:
        torch.manual_seed(0 if checkpoint is None else 123)
        module = lora_student(tiny_folder, train=train, lr_scheduler=None)
        return fit(module, *callbacks, merges(), runs.checkpoints_in(tmp_path), checkpoint=checkpoint)[0]

    def stop() -> None:
        raise RuntimeError("stop")

    whole = runs.weights_of(run())
    with pytest.raises(RuntimeError, match="stop"):
        run(runs.Interrupt(killed_at, "after", stop))
    resumed = run(checkpoint=tmp_path / "last.ckpt")
    assert runs.equal(runs.weights_of(resumed), whole)
    assert resumed._prefix_is_original == (train == "lora_after_merge")


def test_checkpoint_and_export_give_the_adapted_students_logits(
    fit: Fit, tiny_folder: Path, tmp_path: Path, batch: dict[str, Tensor]
):
    module, trainer = fit(lora_student(tiny_folder), merges())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    ours = logits(module.student, batch)
    loaded, _ = load_student(tmp_path / "last.ckpt")
    tokenizer = builders.tiny_tokenizer()
    with pytest.raises(InputError, match="still has adapters"):
        export(module.student, tmp_path / "out", tokenizer=tokenizer, history=module.history)
    adapters.fold(module.student)
    export(module.student, tmp_path / "out", tokenizer=tokenizer, history=module.history)
    plain = type(PLAIN).from_pretrained(tmp_path / "out")
    for model in (loaded, plain):
        torch.testing.assert_close(logits(model, batch), ours, rtol=1e-5, atol=2e-5)
        assert not any("lora" in name or "base_layer" in name for name, _ in model.named_modules())


def test_checkpoint_of_other_adapters_is_refused(fit: Fit, tiny_folder: Path, tmp_path: Path):
    _, trainer = fit(lora_student(tiny_folder), steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for other in (runs.student_of(tiny_folder), lora_student(tiny_folder, lora=Lora(rank=2))):
        with pytest.raises(InputError, match=r"whose adapters are \{'rank': 4"):
            fit(other, checkpoint=tmp_path / "one.ckpt")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train": "all", "lora": Lora()}, "train=all trains no adapters: set model.train"),
        ({"train": "layers", "lora": Lora(base="nf4")}, "trains no adapters"),
        (
            {"objective": None, "phases": [Phase([Logits()], 2, "all"), Phase([Logits()])], "lora": Lora(base="nf4")},
            "base=nf4: packed weights cannot be trained",
        ),
    ],
)
def test_adapters_that_could_not_be_trained_are_refused(tiny_folder: Path, settings: dict[str, object], said: str):
    with pytest.raises(InputError, match=said):
        lora_student(tiny_folder, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"alpha": 0, "dropout": 1.0}, r"alpha=0 must be above 0; dropout=1.0 must lie in \[0, 1\)"),
        ({"targets": []}, r"targets=\[\] must name at least one"),
        ({"base": "int4"}, "base='int4' must be full or nf4"),
        ({"targets": ["lm_head"], "dropout": 0.1}, "dropout=0.1 must be 0 with lm_head among targets"),
    ],
)
def test_wrong_numbers_are_named(settings: dict[str, object], said: str):
    with pytest.raises(InputError, match=said):
        Lora(**settings)  # type: ignore[arg-type]


def test_targets_are_the_familys_projections():
    llama = layout_of(builders.tiny_config())
    assert Lora(targets=["q_proj", "mlp.down_proj"]).projections(llama) == ["self_attn.q_proj", "mlp.down_proj"]
    with pytest.raises(InputError, match=r"no projection c_attn; choose among self_attn.q_proj, .* leave targets out"):
        Lora(targets=["q_proj", "c_attn"]).projections(llama)


def test_without_a_history_lora_trains_every_layer(tiny_folder: Path):
    module = lora_student(tiny_folder, lora=None)
    module.configure_model()
    assert module.lora == Lora()
    assert module.history == MergeHistory(6, teacher=str(tiny_folder))
    assert sum(p.requires_grad for p in module.student.parameters()) == 6 * 7 * 2


ON_HEAD = Lora(rank=4, alpha=8, targets=["q_proj", "lm_head"])


def untied(folder: Path) -> Path:
    return builders.save_tiny(folder, builders.tiny_llama(tied=False))


def test_adapter_on_the_head_is_trained_through_merges_and_becomes_part_of_it(fit: Fit, tmp_path: Path):
    teacher = untied(tmp_path / "untied")
    module = lora_student(teacher, lora=ON_HEAD, train="lora_after_merge")
    module.configure_model()
    theirs, ours = module.teacher.model.lm_head.weight.detach().clone(), module.student.lm_head
    fit(module, merges())
    assert module.student.lm_head is ours
    factors = [parameter for name, parameter in ours.named_parameters() if "lora_" in name]
    assert len(factors) == 2
    assert all(factor.requires_grad and factor.any() for factor in factors)
    delta = 2.0 * factors[1] @ factors[0]
    assert module.teacher.model.lm_head.weight.equal(theirs)
    adapters.fold(module.student)
    torch.testing.assert_close(module.student.lm_head.weight, theirs + delta.detach())


def test_loss_sees_the_adapter_on_the_head(tmp_path: Path, batch: dict[str, Tensor]):
    module = lora_student(untied(tmp_path), lora=ON_HEAD)
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.student.lm_head.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    head, states_BTD = head_of(module.student), module.student.model(batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(head(states_BTD), module.student.lm_head(states_BTD), rtol=1e-5, atol=1e-5)


def test_checkpoint_with_an_adapter_on_the_head_becomes_a_plain_student(fit: Fit, tmp_path: Path):
    module, trainer = fit(lora_student(untied(tmp_path / "untied"), lora=ON_HEAD), steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    student, _ = load_student(tmp_path / "two.ckpt")
    adapters.fold(module.student)
    torch.testing.assert_close(student.lm_head.weight, module.student.lm_head.weight)
    assert type(student.lm_head) is torch.nn.Linear


def test_adapter_on_a_head_that_is_the_embedding_is_refused(tiny_folder: Path):
    with pytest.raises(InputError, match=r"output layer of this llama is its embedding.*leave lm_head out"):
        lora_student(tiny_folder, lora=ON_HEAD).configure_model()
