"""The Python API: from a model to a shorter one that was taught by it, and scores as data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import lcprune
from lcprune import (
    BlockInfluence,
    Calibration,
    Criterion,
    Evenly,
    InputError,
    MergeHistory,
    ProgressiveCollapse,
    TextDataModule,
)
from lcprune.delivery.export import export
from lcprune.distillation.module import DistillationModule
from lcprune.merging.lineage import HISTORY
from tests.builders import save_tiny, tiny_llama, tiny_tokenizer
from tests.cli.recipe import text_file
from tests.distillation.runs import equal, weights_of


@pytest.fixture
def text(tiny_folder: Path, tmp_path: Path) -> TextDataModule:
    return TextDataModule(tokenizer=str(tiny_folder), path=text_file(tmp_path), block_size=32, batch_size=2)


def shortened(text: TextDataModule) -> tuple[PreTrainedModel, MergeHistory]:
    model = AutoModelForCausalLM.from_pretrained(text.tokenizer)
    return model, lcprune.collapse(model, text.calibration_batches(), target_depth=4)


def test_score_has_a_number_for_every_layer_and_leaves_the_model_alone(text: TextDataModule):
    model = tiny_llama()
    before = weights_of(model)
    scores = lcprune.score(model, text.calibration_batches(), criteria=(BlockInfluence(),))
    assert list(scores.criteria) == ["BlockInfluence"]
    assert len(scores.criteria["BlockInfluence"]) == scores.layers == 6
    assert equal(weights_of(model), before)


@dataclass(frozen=True)
class Every(Criterion):
    """Layers that are a multiple of a number are the safest."""

    number: int

    def score(self, calibration: Calibration) -> tuple[float, ...]:
        return tuple(float(layer % self.number) for layer in range(calibration.depth))


class Plain(Criterion):
    """No dataclass."""

    def score(self, calibration: Calibration) -> tuple[float, ...]:
        return (0.0,) * calibration.depth


def test_scores_are_named_by_what_is_no_default(text: TextDataModule):
    batches = text.calibration_batches()
    criteria = [Every(2), Every(3), Plain(), lcprune.Taylor(), lcprune.AngularDistance(2)]
    names = ["Every(number=2)", "Every(number=3)", "Plain", "Taylor", "AngularDistance(span=2)"]
    assert list(lcprune.score(tiny_llama(), batches, criteria=criteria).criteria) == names
    assert lcprune.score(tiny_llama(), batches, criteria=Every(2)).criteria == {"Every(number=2)": (0, 1, 0, 1, 0, 1)}


@pytest.mark.parametrize("criteria", [[Every(2), Every(2)], [Plain(), BlockInfluence(), Plain()]])
def test_two_criteria_of_one_name_are_refused_before_the_model_runs(
    criteria: list[Criterion], text: TextDataModule, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcprune.api.Calibration", lambda *args: pytest.fail("the model was looked at"))
    with pytest.raises(InputError, match=r"2 of them are called (Every\(number=2\)|Plain), and scores"):
        lcprune.score(tiny_llama(), text.calibration_batches(), criteria=criteria)


def test_perplexity_is_that_of_transformers_loss(text: TextDataModule):
    model = tiny_llama().train()
    text.setup()
    batches = list(text.val_dataloader())
    assert len({batch["input_ids"].shape for batch in batches[:-1]}) == 1
    with torch.no_grad():
        losses = [model.eval()(batch["input_ids"], labels=batch["input_ids"]).loss for batch in batches]
    model.train()
    counts = torch.tensor([batch["input_ids"][:, 1:].numel() for batch in batches])
    expected = (torch.stack(losses) @ counts.float() / counts.sum()).exp().item()
    assert lcprune.perplexity(model, text) == pytest.approx(expected, rel=1e-5)
    assert lcprune.perplexity(model, batches) == lcprune.perplexity(model, text)
    assert model.training


def test_distill_returns_the_model_it_was_given_trained(text: TextDataModule):
    model, history = shortened(text)
    before = weights_of(model)
    student, after = lcprune.distill(model, text.tokenizer, text, history=history, steps=2)
    assert student is model
    assert not student.training
    assert after.lineage == history.lineage
    assert not any(value.equal(before[name]) for name, value in weights_of(student).items())


def test_distill_leaves_a_teacher_in_memory_as_it_was(text: TextDataModule):
    teacher = AutoModelForCausalLM.from_pretrained(text.tokenizer).train()
    model, history = shortened(text)
    before = weights_of(teacher)
    lcprune.distill(model, teacher, text, history=history, steps=1)
    assert equal(weights_of(teacher), before)
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_distill_brings_the_student_nearer_to_its_teacher(text: TextDataModule):
    teacher = AutoModelForCausalLM.from_pretrained(text.tokenizer)
    model, history = shortened(text)

    @torch.no_grad()
    def distance() -> float:
        batch = text.calibration_batches()[0]["input_ids"]
        log_q, log_p = (each.eval()(batch).logits.log_softmax(-1) for each in (model, teacher))
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    before = distance()
    lcprune.distill(model, teacher, text, history=history, steps=10, learning_rate=1e-3)
    assert distance() < 0.9 * before


def test_distill_merges_meanwhile_and_its_history_says_so(text: TextDataModule):
    collapse = ProgressiveCollapse(Evenly(4, merges=2, first=0, last=1))
    student, history = lcprune.distill(text.tokenizer, text.tokenizer, text, collapse=collapse, steps=2)
    assert len(student.model.layers) == history.depth == 4
    assert [step.global_step for step in history.steps] == [0, 1]


def test_model_that_merged_while_it_was_distilled_is_no_original(text: TextDataModule, tmp_path: Path):
    collapse = ProgressiveCollapse(Evenly(5, first=0))
    student, history = lcprune.distill(text.tokenizer, text.tokenizer, text, collapse=collapse, steps=1)
    with pytest.raises(InputError, match=r"from 6 layers to 5: go on from that with history=h1"):
        lcprune.collapse(student, text.calibration_batches(), target_depth=4)
    history = lcprune.collapse(student, text.calibration_batches(), target_depth=4, history=history)
    out = lcprune.export(student, tmp_path / "short", tokenizer=text.tokenizer, history=history)
    found = lcprune.load_history(out)
    assert (found.teacher, found.teacher_depth, found.depth) == (text.tokenizer, 6, 4)
    assert "6 -> 4 layers" in (out / "README.md").read_text()


def test_distill_gives_back_the_dtype_it_was_given(text: TextDataModule):
    model, history = shortened(text)
    student, _ = lcprune.distill(model.to(torch.bfloat16), text.tokenizer, text, history=history, steps=1)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


def test_distill_takes_the_path_of_a_text_and_the_folder_of_a_student(text: TextDataModule, tmp_path: Path):
    model, history = shortened(text)
    export(model, tmp_path / "short", tokenizer=tiny_tokenizer(), history=history)
    long = tmp_path / "long.txt"
    long.write_text("layer merge teacher " * 1500)
    student, after = lcprune.distill(tmp_path / "short", text.tokenizer, long, steps=1)
    assert len(student.model.layers) == after.depth == 4


def test_batches_of_a_generator_plan_what_those_of_a_list_do(text: TextDataModule):
    batches = text.calibration_batches()
    for call in (lcprune.plan, lcprune.collapse):
        expected, found = (
            call(
                AutoModelForCausalLM.from_pretrained(text.tokenizer), given, target_depth=4, refit=lcprune.RidgeRefit()
            )
            for given in (batches, (batch for batch in batches))
        )
        assert found.to_dict() == expected.to_dict()
    scores = [lcprune.score(tiny_llama(), given).criteria for given in (batches, (batch for batch in batches))]
    assert scores[0] == scores[1]


def test_export_takes_strings_and_distill_a_single_level(text: TextDataModule, tmp_path: Path):
    model, history = shortened(text)
    out = lcprune.export(model, str(tmp_path / "short"), tokenizer=text.tokenizer, history=history)
    assert lcprune.load_history(out).lineage == history.lineage
    student, _ = lcprune.distill(str(out), text.tokenizer, text, objective=lcprune.Logits(), steps=1)
    assert len(student.model.layers) == 4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda name, text: lcprune.distill(tiny_llama(4), name, text),
            "has 4 layers, 6 by its history: give history=",
        ),
        (lambda name, text: lcprune.distill(tiny_llama(model_type="qwen3"), name, text), "model_type qwen3 and llama"),
        (
            lambda name, text: lcprune.distill(tiny_llama(4), name, text, history=MergeHistory(5)),
            "history starts from 5 layers",
        ),
        (lambda name, text: lcprune.distill(name, tiny_llama(), text), "give both as names"),
        (lambda name, text: lcprune.distill(name, name, text, history=MergeHistory(6)), "brings its own history"),
        (lambda name, text: lcprune.distill(tiny_llama(), tiny_llama(), "my.txt"), "a teacher that has no name: give"),
        (lambda name, text: lcprune.distill(name, name, text, steps=0), "steps=0 must be 1 or more"),
        (
            lambda name, text: lcprune.distill(name, name, text, collapse=Evenly(4)),  # type: ignore[arg-type]
            r"is no ProgressiveCollapse: write ProgressiveCollapse\(Evenly\(",
        ),
    ],
)
def test_distill_refuses_what_does_not_fit(
    call: Callable[[str, TextDataModule], object], words: str, text: TextDataModule
):
    with pytest.raises(InputError, match=words):
        call(text.tokenizer, text)


def test_paths_name_models_and_texts_as_strings_do(text: TextDataModule, tmp_path: Path):
    folder = Path(text.tokenizer)
    student = DistillationModule(teacher=folder, student=str(tmp_path))
    assert (student.teacher_name, student.student_folder) == (str(folder), tmp_path)
    assert TextDataModule(tokenizer=folder, path=str(text_file(tmp_path))).tokenizer == str(folder)
    model, history = shortened(text)
    for given in (folder, model):
        _, after = lcprune.distill(given, folder, text, history=history if given is model else None, steps=1)
        assert after.teacher == str(folder)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DistillationModule(teacher=tiny_llama()), "model.teacher=<LlamaForCausalLM> must be text or a path"),  # type: ignore[arg-type]
        (lambda: DistillationModule(student=3), "model.student=3 must be text or a path"),  # type: ignore[arg-type]
        (lambda: TextDataModule(tokenizer=tiny_tokenizer()), "data.tokenizer=<.*> must be text or a path"),  # type: ignore[arg-type]
        (lambda: TextDataModule(path=3), "data.path=3 must be text or a path"),  # type: ignore[arg-type]
        (lambda: TextDataModule(chat_template=["a"]), r"data.chat_template=\['a'\] must be text or a path"),  # type: ignore[arg-type]
        (lambda: lcprune.distill(3, "t", "my.txt"), "student=3 must be text or a path"),  # type: ignore[arg-type]
        (lambda: lcprune.distill("s", ["t"], "my.txt"), r"teacher=\['t'\] must be text or a path"),  # type: ignore[arg-type]
        (lambda: lcprune.distill("s", "t", 3), "text=3 must be text or a path"),  # type: ignore[arg-type]
        (lambda: lcprune.load_history(None), "folder=None must be text or a path"),  # type: ignore[arg-type]
    ],
)
def test_value_that_is_no_name_is_refused_where_it_is_given(call: Callable[[], object], words: str):
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize("place", ["short", "run", f"short/{HISTORY}"])
def test_history_is_found_in_a_folder_a_run_and_a_file(place: str, tmp_path: Path):
    history = MergeHistory(6, teacher="somewhere")
    for folder in (tmp_path / "short", tmp_path / "run" / "student"):
        folder.mkdir(parents=True)
        (folder / HISTORY).write_text(history.to_json())
    assert lcprune.load_history(tmp_path / place) == history


def test_history_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no history\.json: name a folder"):
        lcprune.load_history(tmp_path)


def test_text_without_a_tokenizer_is_read_with_the_teachers(text: TextDataModule, tmp_path: Path):
    unnamed = TextDataModule(path=text_file(tmp_path), block_size=32, batch_size=2)
    lcprune.distill(text.tokenizer, text.tokenizer, unnamed, steps=1)
    assert unnamed.tokenizer == text.tokenizer
    pairs = zip(unnamed.calibration_batches(), text.calibration_batches(), strict=True)
    assert all(one["input_ids"].equal(other["input_ids"]) for one, other in pairs)


def test_text_in_the_tokens_of_another_vocabulary_is_refused_before_weights_are_loaded(
    text: TextDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcprune.distillation.resumable.load_pair", lambda *args: pytest.fail("weights were loaded"))
    another = tiny_tokenizer()
    another.add_tokens(["<another>"])
    another.save_pretrained(save_tiny(tmp_path / "other"))
    other = TextDataModule(tokenizer=str(tmp_path / "other"), path=text_file(tmp_path), block_size=32, batch_size=2)
    with pytest.raises(InputError, match="other' has another vocabulary than the teacher"):
        lcprune.distill(text.tokenizer, text.tokenizer, other, steps=1)


def test_tokenizer_of_the_same_vocabulary_in_another_folder_is_the_teachers(text: TextDataModule, tmp_path: Path):
    folder = str(save_tiny(tmp_path / "same"))
    same = TextDataModule(tokenizer=folder, path=text_file(tmp_path), block_size=32, batch_size=2)
    assert lcprune.distill(text.tokenizer, text.tokenizer, same, steps=1)[1].depth == 6


def test_teacher_in_memory_without_a_name_needs_the_name_of_a_tokenizer(text: TextDataModule, tmp_path: Path):
    model, history = shortened(text)
    for unnamed in (TextDataModule(path=text_file(tmp_path)), text_file(tmp_path)):
        with pytest.raises(InputError, match=r"a teacher that has no name: give TextDataModule\(tokenizer=NAME"):
            lcprune.distill(model, tiny_llama(), unnamed, history=history)
