"""A run that begins where `lcprune collapse` or an earlier run has left a student."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lcprune import AtSteps, DistillationModule, Evenly, Lora, ProgressiveCollapse
from lcprune.delivery.export import export
from lcprune.distillation.checkpoint import load_student
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Rdsc
from lcprune.merging.planners import FixedPlan
from tests import builders
from tests.distillation import runs

MERGED = MergeStep((2, 3), {"class_path": "Rdsc"}, (0.5, 0.5), global_step=5)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Five layers in a folder: those of the teacher but for the merged third."""
    student = builders.tiny_llama()
    history = MergeHistory(6, (MERGED,), str(tiny_folder))
    surgery.apply(student, MERGED)
    out = tmp_path_factory.mktemp("short") / "student"
    return export(student, out, tokenizer=builders.tiny_tokenizer(), history=history)


def begun(teacher: Path, short: Path, **settings: object) -> DistillationModule:
    module = runs.student_of(teacher, student=short, **settings)
    module.configure_model()
    return module


def test_student_begins_with_the_folders_weights_and_lineage(tiny_folder: Path, short: Path, batch: dict[str, Tensor]):
    module = begun(tiny_folder, short)
    assert module.history.lineage == ((0,), (1,), (2, 3), (4,), (5,))
    assert module.history.steps[0].global_step is None
    expected = builders.tiny_llama()
    surgery.apply(expected, MERGED)
    with torch.no_grad():
        assert module.student.eval()(batch["input_ids"]).logits.equal(expected(batch["input_ids"]).logits)
        assert module.teacher is not None
        teachers = module.teacher.model(batch["input_ids"]).logits
    assert teachers.equal(builders.tiny_llama()(batch["input_ids"]).logits)


def test_what_is_not_trained_and_equal_stays_one_copy_with_the_teachers(tiny_folder: Path, short: Path):
    module = begun(tiny_folder, short, train="merged")
    assert module.teacher is not None
    theirs = {parameter.data_ptr() for parameter in module.teacher.model.parameters()}
    own = {name for name, parameter in module.student.named_parameters() if parameter.data_ptr() not in theirs}
    assert own == {f"model.layers.2.{name}" for name, _ in module.student.model.layers[2].named_parameters()}
    assert module._prefix_is_original


def test_student_that_differs_before_the_first_merge_shares_no_prefix(tiny_folder: Path, tmp_path: Path):
    student = builders.tiny_llama()
    surgery.apply(student, MERGED)
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    history = MergeHistory(6, (MERGED,), str(tiny_folder))
    folder = export(student, tmp_path / "student", tokenizer=builders.tiny_tokenizer(), history=history)
    assert not begun(tiny_folder, folder, train="merged")._prefix_is_original


def test_schedule_counts_from_the_folders_depth_and_a_run_resumes(
    tiny_folder: Path, short: Path, text: Path, tmp_path: Path
):
    collapse = ProgressiveCollapse(AtSteps({2: 4}), planner=FixedPlan([[4, 5]]), operator=Drop("last"))
    whole = runs.student_of(tiny_folder, student=short, lr_scheduler=None)
    trainer = runs.trainer_for(tmp_path, collapse, max_steps=6)
    trainer.fit(whole, datamodule=runs.data_for(tiny_folder, text))
    assert whole.history.lineage == ((0,), (1,), (2, 3), (4, 5))

    first = runs.trainer_for(tmp_path, collapse, runs.checkpoints_in(tmp_path), max_steps=4)
    first.fit(
        runs.student_of(tiny_folder, student=short, lr_scheduler=None), datamodule=runs.data_for(tiny_folder, text)
    )
    again = runs.student_of(tiny_folder, student=short, lr_scheduler=None)
    second = runs.trainer_for(tmp_path, collapse, runs.checkpoints_in(tmp_path), max_steps=6)
    second.fit(again, datamodule=runs.data_for(tiny_folder, text), ckpt_path=str(tmp_path / "last.ckpt"))
    assert again.history.lineage == whole.history.lineage
    torch.testing.assert_close(dict(again.student.state_dict()), dict(whole.student.state_dict()))
    assert load_student(tmp_path / "last.ckpt")[1].history.depth == 4


def test_checkpoint_of_a_run_that_began_elsewhere_is_refused(
    tiny_folder: Path, short: Path, text: Path, tmp_path: Path
):
    trainer = runs.trainer_for(tmp_path, runs.two_merges(), runs.checkpoints_in(tmp_path), max_steps=8)
    trainer.fit(runs.student_of(tiny_folder), datamodule=runs.data_for(tiny_folder, text))
    other = runs.trainer_for(tmp_path, runs.checkpoints_in(tmp_path), max_steps=9)
    with pytest.raises(InputError, match=r"began with 0 merges done, model\.student says 1"):
        other.fit(
            runs.student_of(tiny_folder, student=short),
            datamodule=runs.data_for(tiny_folder, text),
            ckpt_path=str(tmp_path / "last.ckpt"),
        )


def test_resume_without_the_folder_that_the_run_began_with_is_refused(
    tiny_folder: Path, short: Path, text: Path, tmp_path: Path
):
    trainer = runs.trainer_for(tmp_path, runs.checkpoints_in(tmp_path), max_steps=2)
    trainer.fit(runs.student_of(tiny_folder, student=short), datamodule=runs.data_for(tiny_folder, text))
    again = runs.trainer_for(tmp_path, runs.checkpoints_in(tmp_path), max_steps=4)
    with pytest.raises(InputError, match=r"began with 1 merges done, model\.student says 0"):
        again.fit(
            runs.student_of(tiny_folder),
            datamodule=runs.data_for(tiny_folder, text),
            ckpt_path=str(tmp_path / "last.ckpt"),
        )


def test_schedule_that_does_not_go_below_the_folders_depth_is_refused(tiny_folder: Path, short: Path, text: Path):
    trainer = runs.trainer_for(short.parent / "run", ProgressiveCollapse(AtSteps({2: 5}), operator=Rdsc()))
    with pytest.raises(InputError, match="the target depth 5 must lie between 1 and 4"):
        trainer.fit(runs.student_of(tiny_folder, student=short), datamodule=runs.data_for(tiny_folder, text))


def test_adapters_on_a_folders_student(tiny_folder: Path, short: Path):
    module = begun(tiny_folder, short, train="lora", lora=Lora(rank=2))
    trained = [name for name, parameter in module.student.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


def test_packed_base_is_refused(tiny_folder: Path, short: Path):
    with pytest.raises(InputError, match=r"lora\.base=nf4 .* set lora\.base: full"):
        runs.student_of(tiny_folder, student=short, train="lora", lora=Lora(base="nf4"))


def test_teacher_may_be_spelled_in_another_way(tiny_folder: Path, short: Path, monkeypatch: pytest.MonkeyPatch):
    expected = runs.student_of(tiny_folder, student=short).history.depth
    monkeypatch.chdir(tiny_folder.parent)
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    name = tiny_folder.name
    for spelled in (f"~/{name}", Path(name), tiny_folder.parent / "." / name, f"{tiny_folder}/"):
        assert DistillationModule(teacher=str(spelled), student=short).history.depth == expected


@pytest.mark.parametrize("recorded", ["/no/such/folder/llama", "someone/llama"])
def test_student_from_another_machine_is_taken_with_a_warning(
    tiny_folder: Path, short: Path, tmp_path: Path, recorded: str
):
    expected = runs.student_of(tiny_folder, student=short).history.lineage
    moved = _descending_from(recorded, short, tmp_path)
    with pytest.warns(UserWarning, match=f"descends from '{recorded}', which is not here: .* taken for the same model"):
        found = runs.student_of(tiny_folder, student=moved).history
    assert (found.lineage, found.teacher) == (expected, str(tiny_folder))


@pytest.mark.parametrize("named", ["intermediate_size", "hidden_size", "vocab_size"])
def test_student_from_another_machine_of_another_shape_is_refused(
    tiny_folder: Path, short: Path, tmp_path: Path, named: str
):
    moved = _descending_from("/no/such/folder/llama", short, tmp_path)
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    double = 2 * config[named]
    (other / "config.json").write_text(json.dumps(config | {named: double}), encoding="utf-8")
    with pytest.raises(InputError, match=rf"of another shape \({named} \d+\) than .* \({named} {double}\)"):
        _ = DistillationModule(teacher=str(other), student=moved).history


def test_student_of_another_model_on_the_hub_is_refused(short: Path, tmp_path: Path):
    moved = _descending_from("someone/llama", short, tmp_path)
    with pytest.raises(InputError, match=r"descends from 'someone/llama', .* delete 'teacher' and 'sha256' in .*json"):
        _ = DistillationModule(teacher="demo:smollm2", student=moved).history
    content = json.loads((moved / "history.json").read_text(encoding="utf-8"))
    nameless = {name: value for name, value in content.items() if name not in ("teacher", "sha256")}
    (moved / "history.json").write_text(json.dumps(nameless), encoding="utf-8")
    with pytest.raises(InputError, match="descends from a model of 6 layers"):
        _ = DistillationModule(teacher="demo:smollm2", student=moved).history


def _descending_from(teacher: str, short: Path, tmp_path: Path) -> Path:
    moved = Path(shutil.copytree(short, tmp_path / "moved"))
    history = replace(MergeHistory.load(short / "history.json"), teacher=teacher)
    (moved / "history.json").write_text(history.sealed(), encoding="utf-8")
    return moved


def test_folder_of_another_kind_is_one_sentence(tiny_folder: Path, short: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"model\.student=.* holds no history\.json"):
        _ = runs.student_of(tiny_folder, student=tiny_folder).history
    with pytest.raises(InputError, match=r"descends from .*, model\.teacher is 'demo:smollm2'"):
        _ = DistillationModule(student=short).history
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "history.json"):
        (bare / name).write_bytes((short / name).read_bytes())
    with pytest.raises(InputError, match="holds no weights"):
        _ = runs.student_of(tiny_folder, student=bare).history
    folder = builders.save_tiny(tmp_path / "seven", builders.tiny_llama(n_layers=4))
    history = replace(MergeHistory.load(short / "history.json"), teacher="")
    (folder / "history.json").write_text(history.to_json(), encoding="utf-8")
    with pytest.raises(InputError, match=r"has 4 layers, its history\.json says 5"):
        _ = runs.student_of(tiny_folder, student=folder).history


def test_second_fit_of_a_module_merges_on_from_where_the_first_one_ended(tiny_folder: Path, text: Path, tmp_path: Path):
    module = runs.student_of(tiny_folder)
    for depth in (5, 4):
        trainer = runs.trainer_for(tmp_path, ProgressiveCollapse(Evenly(depth)), max_steps=2)
        trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
        assert module.student.config.num_hidden_layers == depth
    assert [step.global_step for step in module.history.steps] == [None, 0]


def test_second_fit_of_a_module_that_is_short_enough_is_refused(tiny_folder: Path, text: Path, tmp_path: Path):
    module = runs.student_of(tiny_folder)
    runs.trainer_for(tmp_path, ProgressiveCollapse(Evenly(5)), max_steps=2).fit(
        module, datamodule=runs.data_for(tiny_folder, text)
    )
    with pytest.raises(InputError, match="target depth 5 must lie between 1 and 4, because the model has 5 layers"):
        runs.trainer_for(tmp_path, ProgressiveCollapse(Evenly(5)), max_steps=2).fit(
            module, datamodule=runs.data_for(tiny_folder, text)
        )
