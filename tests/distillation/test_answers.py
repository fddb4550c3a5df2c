"""Runs on chat: only answers teach, whichever way documents lie in blocks, and at every level of the distillation."""

import json
import random
from pathlib import Path

import pytest
import torch

from lcprune import Boundary, DistillationModule, Labels, Local, Logits, TextDataModule
from lcprune.distillation import objectives
from lcprune.distillation.cache import keys_of, rows_of
from lcprune.distillation.metrics import HeldOut
from lcprune.errors import InputError
from tests import builders
from tests.distillation import caches, runs

LEVELS = [Logits(), Labels(0.5), Boundary(0.5, layers="all"), Local(0.5)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred questions of different lengths and their answers."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdeinorst", k=chance.randint(2, 7))) for _ in range(30)]
    rows = [
        {"prompt": " ".join(chance.choices(words, k=chance.randint(1, 3))), "response": chance.choice(words)}
        for _ in range(100)
    ]
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def data_for(teacher: Path, chat: Path, **settings: object) -> TextDataModule:
    return runs.data_for(teacher, chat, **{"block_size": 96, "validation_blocks": 2} | settings)


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, chat: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillationModule:
    """A student of four layers, after twelve steps on answers."""
    module = runs.student_of(tiny_folder, objective=LEVELS)
    runs.trainer_for(tmp_path_factory.mktemp("run"), runs.two_merges()).fit(
        module, datamodule=data_for(tiny_folder, chat)
    )
    return module


def whole_text(teacher: Path, chat: Path, packing: str) -> list[dict[str, torch.Tensor]]:
    """All validation documents, one part of the text whatever the packing."""
    settings = {"packing": packing, "validation_blocks": None, "validation_fraction": 0.2, "batch_size": 1}
    module = data_for(teacher, chat, **settings)
    module.setup()
    return list(module.val_dataloader())


def test_run_on_answers_ends_with_the_student_it_was_to_make(trained: DistillationModule):
    assert trained.history.depth == 4
    assert all(bool(weight.isfinite().all()) for weight in trained.student.parameters())


def test_every_level_sees_the_same_in_packed_and_in_padded_documents(
    trained: DistillationModule, tiny_folder: Path, chat: Path
):
    sums: list[dict[str, float]] = []
    for packing in ("separate", "pad"):
        total, scored = dict.fromkeys(("logits", "labels", "boundary", "local"), 0.0), 0
        for batch in whole_text(tiny_folder, chat, packing):
            terms = objectives.objective(LEVELS, trained.run(batch, LEVELS), trained.history.lineage)
            count = int(objectives.scored_positions(batch).sum())
            total = {name: value + count * terms[name].item() for name, value in total.items()}
            scored += count
        sums.append({name: value / scored for name, value in total.items()})
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)
    assert min(sums[0].values()) > 0


@pytest.mark.parametrize("packing", ["separate", "pad", "concatenate"])
def test_data_module_knows_what_the_objective_scores(tiny_folder: Path, chat: Path, packing: str):
    module = data_for(tiny_folder, chat, packing=packing)
    module.setup()
    for batch in module.train_dataloader():
        found = batch.pop("scored")
        assert found.equal(objectives.with_scored(batch)["scored"])
        assert len(found) == int(objectives.scored_positions(batch).sum()) > 0


def test_held_out_figures_are_those_of_the_answers_alone(trained: DistillationModule, tiny_folder: Path, chat: Path):
    figures = []
    for packing in ("separate", "pad"):
        metric = HeldOut()
        for batch in whole_text(tiny_folder, chat, packing):
            trained.observe(batch, metric)
        figures.append({name: value.item() for name, value in metric.compute().items()} | {"n": metric.tokens.item()})
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    held_out = {json.loads(line)["response"] for line in chat.read_text().splitlines()}
    tokenizer = builders.tiny_tokenizer()
    said = [
        tokenizer.decode(batch["labels"][batch["labels"] != -100]) for batch in whole_text(tiny_folder, chat, "pad")
    ]
    assert {text.removesuffix("<eos>") for text in said} <= held_out
    assert figures[0]["n"] == sum(len(text) - len("<eos>") + 1 for text in said)


@pytest.mark.parametrize("packing", ["separate", "pad", "concatenate"])
def test_interrupted_run_on_answers_ends_like_one_that_was_not(
    tiny_folder: Path, chat: Path, tmp_path: Path, packing: str
):
    ends = []
    for resume in (None, tmp_path / "last.ckpt"):
        module = runs.student_of(tiny_folder, lr_scheduler=None)
        trainer = runs.trainer_for(tmp_path, runs.two_merges(), runs.checkpoints_in(tmp_path, every=5), max_steps=9)
        trainer.fit(module, datamodule=data_for(tiny_folder, chat, packing=packing), ckpt_path=resume)
        ends.append(runs.weights_of(module.student))
    assert runs.equal(*ends)


def test_prefix_is_handed_over_with_the_documents_apart(trained: DistillationModule, tiny_folder: Path, chat: Path):
    batch = whole_text(tiny_folder, chat, "separate")[0]
    teacher = trained.teacher
    assert teacher is not None
    student, lineage = teacher.model, tuple((layer,) for layer in range(6))
    passes = [objectives.run([Logits()], batch, student, teacher, lineage, prefix=prefix) for prefix in (0, 3)]
    first, second = (one.student.last for one in passes)
    torch.testing.assert_close(first, second)


def test_teacher_cache_of_packed_documents_is_the_run_with_the_teacher(tiny_folder: Path, chat: Path, tmp_path: Path):
    rows = data_for(tiny_folder, chat).training_blocks()
    assert rows.shape[1:] == (2, 96)
    folder = caches.fill(tmp_path / "cache", tiny_folder, rows, top_k=builders.VOCABULARY, dtype="bfloat16")
    losses = []
    for cache in (None, folder):
        seen = runs.Losses()
        settings = {"teacher_dtype": "bfloat16", "objective": [Logits(), Labels(0.3)], "teacher_cache": cache}
        trainer = runs.trainer_for(tmp_path, seen, runs.two_merges(), max_steps=9)
        trainer.fit(runs.student_of(tiny_folder, **settings), datamodule=data_for(tiny_folder, chat))
        losses.append(seen.seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_training_blocks_of_packed_documents_are_what_a_run_asks_a_cache_for(tiny_folder: Path, chat: Path):
    data = data_for(tiny_folder, chat, batch_size=1)
    known = keys_of(data.training_blocks())
    asked = [key for batch in data.train_dataloader() for key in keys_of(rows_of(batch))]
    assert sorted(asked) == sorted(known)
    assert len(known) > 5


def test_teacher_cache_tells_apart_the_same_tokens_in_other_documents():
    ids = torch.arange(6)[None]
    one, other = (
        rows_of({"input_ids": ids, "position_ids": torch.tensor([positions])})
        for positions in ([0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3])
    )
    assert keys_of(one) != keys_of(other)
    assert keys_of(one) != keys_of(rows_of({"input_ids": ids}))


def test_teacher_cache_of_padded_documents_is_refused(tiny_folder: Path, chat: Path):
    with pytest.raises(InputError, match=r"data\.packing=pad pads them"):
        data_for(tiny_folder, chat, packing="pad").training_blocks()


def test_predictions_of_documents_kept_apart_are_refused(tiny_folder: Path, chat: Path):
    data = data_for(tiny_folder, chat)
    data.setup()
    with pytest.raises(InputError, match="predict goes on"):
        data.predict_dataloader()


def test_family_that_would_mix_documents_is_refused_before_its_weights_are_loaded(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher = builders.save_tiny(tmp_path / "bloom", builders.tiny_llama(2, model_type="bloom"))
    monkeypatch.setattr(DistillationModule, "configure_model", lambda self: pytest.fail("weights are loaded"))
    with pytest.raises(InputError, match=r"data\.packing=separate.*bloom"):
        runs.trainer_for(tmp_path).fit(runs.student_of(teacher), datamodule=data_for(teacher, chat))
