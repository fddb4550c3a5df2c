"""What a checkpoint says, that it is read as plain data, and that every wrong one is one sentence."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lcprune import AtSteps, ProgressiveCollapse, TextDataModule
from lcprune.distillation import checkpoint
from lcprune.distillation.checkpoint import KEY, Record, goes_on, load_student, read
from lcprune.distillation.fingerprint import fingerprint_of
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.randomness import restore_rng_state, rng_state
from lcprune.distillation.storing import META
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeHistory, MergeStep
from tests import builders
from tests.distillation import runs

HISTORY = MergeHistory(
    6,
    (
        MergeStep((1, 2), {"class_path": "Drop", "init_args": {"keep": "last"}}, (0.5, 0.5), {"score": 0.25}, 3),
        MergeStep((2, 3), {"class_path": "Drop"}, (1.0, 0.0), global_step=7, measured={"val/perplexity": 9.5}),
    ),
    "some/model",
)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, text: Path
) -> tuple[Path, DistillationModule]:
    """The last checkpoint of a run with two merges, and the module that wrote it; without a scheduler; read only."""
    folder = tmp_path_factory.mktemp("finished")
    module = runs.student_of(tiny_folder, lr_scheduler=None)
    trainer = runs.trainer_for(folder, runs.two_merges(), max_steps=9)
    trainer.fit(module, datamodule=runs.data_for(tiny_folder, text))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", module


def test_record_survives_a_file_read_as_plain_data(tmp_path: Path):
    record = Record(HISTORY, fingerprint_of(builders.tiny_config()), "bfloat16", (rng_state(), rng_state()))
    torch.save({KEY: record.to_dict()}, tmp_path / "record")
    back = Record.of(torch.load(tmp_path / "record", weights_only=True))
    assert (back.history, back.fingerprint, back.dtype) == (record.history, record.fingerprint, record.dtype)
    expected = [torch.rand(3), *torch.randn(2)]
    restore_rng_state(back.rng[1])
    assert all(now.equal(then) for now, then in zip([torch.rand(3), *torch.randn(2)], expected, strict=True))


@pytest.mark.parametrize("teacher", [False, True])
def test_module_loaded_from_a_checkpoint_alone_is_the_one_that_wrote_it(
    teacher: bool, finished: tuple[Path, DistillationModule], tiny_folder: Path
):
    given = {"teacher": tiny_folder} if teacher else {}
    loaded = DistillationModule.load_from_checkpoint(finished[0], **given)
    assert loaded.history == finished[1].history
    assert runs.equal(runs.weights_of(loaded.student), runs.weights_of(finished[1].student))


def test_read_tells_history_fingerprint_and_dtype(finished: tuple[Path, DistillationModule], tiny_folder: Path):
    record = read(finished[0])
    assert record.history == finished[1].history
    assert [step.global_step for step in record.history.steps] == [3, 7]
    assert record.history.teacher == str(tiny_folder)
    assert record.fingerprint == {
        "model_type": "llama",
        "num_hidden_layers": 6,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "tie_word_embeddings": True,
    }
    assert record.dtype == "float32"
    assert len(record.rng) == 1


def test_checkpoint_with_our_scheduler_is_plain_data(tiny_folder: Path, text: Path, tmp_path: Path):
    trainer = runs.trainer_for(tmp_path, runs.two_merges(), runs.checkpoints_in(tmp_path), max_steps=8)
    trainer.fit(runs.student_of(tiny_folder, lr_scheduler=runs.COSINE), datamodule=runs.data_for(tiny_folder, text))
    assert read(tmp_path / "last.ckpt").history.depth == 4


def test_checkpoint_holds_the_student_only(finished: tuple[Path, DistillationModule]):
    saved = torch.load(finished[0], weights_only=True)
    weights = saved["state_dict"]
    assert all(name.startswith(checkpoint.PREFIX) for name in weights)
    assert len({name.split(".layers.")[1].split(".")[0] for name in weights if ".layers." in name}) == 4
    (groups,) = (state["param_groups"] for state in saved["optimizer_states"])
    assert len(groups[0]["params"]) == len(saved["optimizer_states"][0]["state"]) == 4 * 9 + 2


def test_loaded_student_is_the_modules(finished: tuple[Path, DistillationModule], batch: dict[str, Tensor]):
    student, record = load_student(finished[0])
    assert student.config.num_hidden_layers == len(student.model.layers) == record.history.depth == 4
    assert not student.training
    assert student.lm_head.weight is student.model.embed_tokens.weight
    trained = finished[1].student.eval()
    with torch.no_grad():
        assert student(batch["input_ids"]).logits.equal(trained(batch["input_ids"]).logits)
        cached = student.generate(batch["input_ids"], max_new_tokens=5, do_sample=False, use_cache=True)
        plain = student.generate(batch["input_ids"], max_new_tokens=5, do_sample=False, use_cache=False)
    assert cached.equal(plain)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_loaded_student_is_the_modules_in_every_family(
    family: builders.Family, precision: str, text: Path, tmp_path: Path, batch: dict[str, Tensor]
):
    teacher = runs.save_teacher(tmp_path / "teacher", model=builders.tiny_llama(tied=False, model_type=family))
    module = runs.student_of(teacher, lr_scheduler=None)
    trainer = runs.trainer_for(
        tmp_path, runs.two_merges(), runs.checkpoints_in(tmp_path), max_steps=8, precision=precision
    )
    trainer.fit(module, datamodule=runs.data_for(teacher, text))
    student, _ = load_student(tmp_path / "last.ckpt")
    assert student.config.dtype == student.dtype
    with torch.no_grad():
        assert student(batch["input_ids"]).logits.equal(module.student.eval()(batch["input_ids"]).logits)
    student.save_pretrained(tmp_path / "export")


def test_loaded_student_has_the_teachers_generation_config(text: Path, tmp_path: Path):
    model = builders.tiny_llama()
    model.generation_config.max_new_tokens = 77
    teacher = runs.save_teacher(tmp_path / "teacher", model=model)
    trainer = runs.trainer_for(tmp_path, max_steps=1)
    trainer.fit(runs.student_of(teacher), datamodule=runs.data_for(teacher, text))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert load_student(tmp_path / "one.ckpt")[0].generation_config.max_new_tokens == 77


def test_load_student_needs_the_teachers_config_in_one_sentence(text: Path, tmp_path: Path):
    teacher = runs.save_teacher(tmp_path / "teacher")
    module = runs.student_of(teacher, lr_scheduler=None)
    trainer = runs.trainer_for(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=runs.data_for(teacher, text))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    (teacher / "config.json").unlink()
    with pytest.raises(InputError, match="config"):
        load_student(tmp_path / "one.ckpt")


def _truncated(whole: bytes, fraction: float) -> bytes:
    return whole[: int(len(whole) * fraction)]


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"this is not a checkpoint\n" * 100,
    "zeros": lambda whole: bytes(len(whole)),
    "first_byte": lambda whole: whole[:1],
    "tenth": lambda whole: _truncated(whole, 0.1),
    "half": lambda whole: _truncated(whole, 0.5),
    "all_but_the_end": lambda whole: whole[:-100],
    "head_overwritten": lambda whole: bytes(4096) + whole[4096:],
    "noise": lambda whole: torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0)).numpy().tobytes(),
    "a_pickle": lambda whole: pickle.dumps({"path": Path("x")}),
    "an_empty_pickle": lambda whole: b"\x80\x02.",
    "zip": lambda whole: b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("kind", WRONG)
def test_broken_checkpoint_is_one_sentence(kind: str, finished: tuple[Path, DistillationModule], tmp_path: Path):
    path = tmp_path / "broken.ckpt"
    path.write_bytes(WRONG[kind](finished[0].read_bytes()))
    for reader in (read, load_student):
        with pytest.raises(InputError, match=r"ckpt_path=.*broken\.ckpt") as caught:
            reader(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"state_dict": {}, "pytorch-lightning_version": "2.6.6"},
        {KEY: None},
        {KEY: {}},
        {KEY: {"history": {"format": 1}}},
        {KEY: {"history": MergeHistory(6).to_dict(), "fingerprint": {}, "dtype": "float32"}},
    ],
)
def test_foreign_checkpoint_is_one_sentence(content: object, tmp_path: Path):
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(InputError):
        read(tmp_path / "foreign.ckpt")


@pytest.mark.parametrize("path", ["none.ckpt", "."])
def test_missing_checkpoint_is_one_sentence(path: str, tmp_path: Path):
    with pytest.raises(InputError, match="does not exist or is not a file"):
        read(tmp_path / path)


def test_checkpoint_of_another_model_is_refused_before_its_weights(
    finished: tuple[Path, DistillationModule], text: Path, tmp_path: Path
):
    other = runs.save_teacher(tmp_path / "other", model=builders.tiny_llama(7))
    trainer = runs.trainer_for(tmp_path, ProgressiveCollapse(AtSteps({3: 5})))
    with pytest.raises(InputError, match=r"num_hidden_layers 6.*num_hidden_layers 7"):
        trainer.fit(runs.student_of(other), datamodule=runs.data_for(other, text), ckpt_path=str(finished[0]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"optimizer": runs.SGD}, "optimizer is AdamW, .* is SGD"), ({"train": "layers"}, "all parameters .* of layers")],
)
def test_checkpoint_of_another_optimizer_is_refused_for_training_and_read_for_the_rest(
    settings: dict[str, object],
    words: str,
    finished: tuple[Path, DistillationModule],
    tiny_folder: Path,
    text: Path,
    tmp_path: Path,
):
    module, data = runs.student_of(tiny_folder, **settings), runs.data_for(tiny_folder, text)
    assert runs.trainer_for(tmp_path).validate(module, datamodule=data, ckpt_path=finished[0])
    module = runs.student_of(tiny_folder, **settings)
    with pytest.raises(InputError, match=words):
        runs.trainer_for(tmp_path).fit(module, datamodule=data, ckpt_path=finished[0])


def test_checkpoint_of_other_merges_is_refused(finished: tuple[Path, DistillationModule], tiny_folder: Path):
    module = runs.student_of(tiny_folder)
    module.configure_model()
    step = MergeStep((4, 5), {"class_path": "Drop"}, (1.0, 0.0))
    surgery.apply(module.student, step)
    module.history = module.history.append(step)
    with pytest.raises(InputError, match="merged otherwise"):
        module.on_load_checkpoint(torch.load(finished[0], weights_only=True))


def test_loading_a_checkpoint_leaves_the_teacher_alone(
    finished: tuple[Path, DistillationModule], tiny_folder: Path, text: Path, tmp_path: Path
):
    # The run trained everything; this module trains layers and shares its embeddings with the teacher.
    module = runs.student_of(tiny_folder, train="layers", lr_scheduler=None)
    module.configure_model()
    assert module.teacher is not None
    before = runs.weights_of(module.teacher.model)
    data = runs.data_for(tiny_folder, text)
    runs.trainer_for(tmp_path).validate(module, data, ckpt_path=str(finished[0]), verbose=False, weights_only=True)
    assert not module.student.model.embed_tokens.weight.equal(before["model.embed_tokens.weight"])
    assert runs.equal(runs.weights_of(module.teacher.model), before)


def test_validation_of_a_checkpoint_has_its_depth(
    finished: tuple[Path, DistillationModule], tiny_folder: Path, text: Path, tmp_path: Path
):
    module = runs.student_of(tiny_folder)
    data: TextDataModule = runs.data_for(tiny_folder, text)
    trainer = runs.trainer_for(tmp_path)
    (logged,) = trainer.validate(module, data, ckpt_path=str(finished[0]), verbose=False, weights_only=True)
    assert module.history == finished[1].history
    (again,) = runs.trainer_for(tmp_path).validate(finished[1], data, verbose=False)
    assert logged == again


@pytest.mark.parametrize("kept", [{"lr_schedulers": []}, {}], ids=["whole", "weights alone"])
def test_checkpoint_in_shards_says_whether_a_run_can_go_on_from_it(tmp_path: Path, kept: dict[str, object]):
    """As Lightning's ModelParallelStrategy leaves them: what is no tensor lies in one file of its own."""
    torch.save({"global_step": 3, **kept}, tmp_path / META)
    assert goes_on(tmp_path) is bool(kept)
