"""Student beside teacher: the cosine by lineage, the student as it was before training, generated text."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lcprune.delivery.decoding import all_continuations, continuations
from lcprune.delivery.likeness import compare, kinship, merge_untrained
from lcprune.delivery.samples import PROMPT, openings, prompts, side_by_side
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.calibration import evaluating, layer_outputs
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.surgery import second_view
from tests import builders
from tests.delivery.run_folders import DROP, step

Models = Callable[..., PreTrainedModel]
HISTORY = MergeHistory(6, (step(3, 4, operator=DROP),))


@pytest.fixture
def batches(token_batches: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids} for ids in token_batches]


@pytest.fixture
def student(tiny_llama: Models) -> PreTrainedModel:
    model = tiny_llama()
    surgery.apply_all(model, HISTORY.steps)
    return model


def test_kinship_of_equal_models_is_one_everywhere(tiny_llama: Models, batches: list[dict[str, Tensor]]):
    found = kinship(tiny_llama(), tiny_llama(), MergeHistory(6).lineage, batches)
    assert found == pytest.approx([1.0] * 6, abs=1e-5)


def test_kinship_is_one_before_the_first_merged_layer_and_less_from_it_on(
    tiny_llama: Models, student: PreTrainedModel, batches: list[dict[str, Tensor]]
):
    found = kinship(tiny_llama(), student, HISTORY.lineage, batches)
    assert found[:3] == pytest.approx([1.0] * 3, abs=1e-5)
    assert max(found[3:]) < 0.99


def test_kinship_compares_with_the_last_ancestor(
    tiny_llama: Models, student: PreTrainedModel, batches: list[dict[str, Tensor]]
):
    teacher, batch = tiny_llama(), batches[0]
    states = {}
    for model, layer in ((teacher, 4), (student, 3)):
        with evaluating(model), layer_outputs(model.model.layers, [layer]) as kept:
            model(**batch)
        states[layer] = kept[layer]
    expected = torch.nn.functional.cosine_similarity(states[3], states[4], dim=-1).mean().item()
    assert kinship(teacher, student, HISTORY.lineage, [batch])[3] == pytest.approx(expected, abs=1e-6)


def test_kinship_leaves_padding_out(tiny_llama: Models, student: PreTrainedModel, batches: list[dict[str, Tensor]]):
    ids = batches[0]["input_ids"]
    padded = torch.cat([ids, torch.zeros_like(ids)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
    plain = kinship(tiny_llama(), student, HISTORY.lineage, [{"input_ids": ids}])
    masked = kinship(tiny_llama(), student, HISTORY.lineage, [{"input_ids": padded, "attention_mask": mask}])
    assert masked == pytest.approx(plain, abs=1e-5)


def test_comparison_has_both_models_and_their_tokens(
    tiny_llama: Models, student: PreTrainedModel, batches: list[dict[str, Tensor]]
):
    found = compare(tiny_llama(), student, HISTORY.lineage, batches)
    assert found.tokens == 3 * 2 * 16
    assert (len(found.teacher.cosines), len(found.student.cosines), len(found.kinship)) == (7, 6, 5)
    assert (len(found.teacher.weights.raw), len(found.student.weights.raw)) == (5, 4)


def test_untrained_student_has_the_weights_of_the_merge_and_leaves_the_teacher_alone(
    tiny_llama: Models, student: PreTrainedModel, batches: list[dict[str, Tensor]]
):
    teacher = tiny_llama()
    view = second_view(teacher)
    merge_untrained(view, MergeHistory(6), HISTORY, batches)
    merged, expected = view.state_dict(), student.state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    untouched = tiny_llama().state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in teacher.state_dict().items())


def test_untrained_student_goes_on_from_where_the_run_began(
    tiny_llama: Models, student: PreTrainedModel, batches: list[dict[str, Tensor]]
):
    whole = HISTORY.append(step(0, 1, at=3, operator=DROP))
    merge_untrained(student, HISTORY, whole, batches)
    assert len(student.model.layers) == 4


def test_refit_of_a_run_is_not_made_up_for(tiny_llama: Models, batches: list[dict[str, Tensor]]):
    refitted = MergeHistory(6, (step(3, 4, refit={"class_path": "RidgeRefit"}),))
    with pytest.raises(InputError, match="the run refitted what it merged"):
        merge_untrained(tiny_llama(), MergeHistory(6), refitted, batches)


def test_prompts_are_spread_over_the_text_and_at_most_half_of_a_block():
    batches = [{"input_ids": torch.arange(8).view(2, 4) + 10 * number} for number in range(3)]
    assert [ids.tolist() for ids in prompts(batches, 3)] == [[0, 1], [10, 11], [20, 21]]
    assert len(prompts(batches, 100)) == 6
    assert prompts(batches, 0) == []
    assert len(prompts([{"input_ids": torch.zeros(1, 500, dtype=torch.int64)}], 1)[0]) == PROMPT


def test_conversations_are_given_up_to_their_first_answer():
    ids_BT = torch.arange(10).repeat(4, 1) + torch.tensor([[0], [10], [20], [30]])
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :2] = 0  # padding on the left
    learned = torch.zeros_like(ids_BT, dtype=torch.bool)
    learned[0, 4:6] = learned[0, 8:] = learned[1, 6:] = True  # two answers, one; in row 2 none, row 3 is running text
    learned[3, 1:] = True
    labels_BT = ids_BT.masked_fill(~learned, -100)
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    assert [one.tolist() for one in openings(batch)] == [
        [0, 1, 2, 3], [12, 13, 14, 15], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34]
    ]  # fmt: skip


def test_conversations_of_one_row_are_given_from_their_own_beginning():
    labels_BT = torch.tensor([[0, -100, -100, -100, -100, 5, 6, -100]])  # the row begins within an answer
    positions_BT = torch.tensor([[7, 8, 0, 1, 2, 3, 4, 0]])
    batch = {"input_ids": torch.arange(8)[None], "labels": labels_BT, "position_ids": positions_BT}
    assert [one.tolist() for one in openings(batch)] == [[2, 3, 4]]


def test_filler_and_later_documents_are_no_beginning():
    ids_BT = torch.arange(12)[None]
    positions_BT = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5]])
    counted_BT = torch.tensor([[True] * 6 + [False] * 6])
    batch = {"input_ids": ids_BT, "position_ids": positions_BT, "counted": counted_BT, "labels": ids_BT}
    assert [one.tolist() for one in openings(batch)] == [[0, 1]]
    assert openings({**batch, "counted": torch.zeros_like(counted_BT)}) == []


def test_texts_end_where_the_positions_of_a_model_do():
    model = builders.tiny_llama(2, model_type="gpt2")
    model.generation_config.eos_token_id = None
    positions = model.config.max_position_embeddings
    long, short = torch.ones(positions - 3, dtype=torch.long), torch.ones(4, dtype=torch.long)
    assert [len(text) for text in all_continuations(model, [long, short], 8)] == [3, 8]


def test_prompts_of_several_lengths_are_continued_each_as_alone(tiny_llama: Models):
    prompts_of = [torch.tensor(ids) for ids in ([1, 2, 3], [4, 5], [6, 7, 8], [9])]
    together = all_continuations(tiny_llama(), prompts_of, 5)
    assert together == [continuations(tiny_llama(), ids_T[None], 5)[0] for ids_T in prompts_of]


def test_both_models_go_on_greedily_from_the_same_words(
    tiny_llama: Models, student: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
):
    begun = prompts([{"input_ids": torch.tensor([tiny_tokenizer("merge the layers")["input_ids"]])}], 1)
    first, again = (side_by_side(tiny_llama(), student, tiny_tokenizer, begun) for _ in range(2))
    assert first == again
    assert first[0].prompt == "merge th"
    assert first[0].teacher != first[0].student


def test_what_models_write_is_what_evaluate_looks_at(
    tiny_llama: Models, student: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
):
    begun = prompts([{"input_ids": torch.tensor([tiny_tokenizer("merge the layers")["input_ids"]])}], 1)
    plain = side_by_side(tiny_llama(), student, tiny_tokenizer, begun)
    teacher = tiny_llama()
    assert teacher.generation_config is not None
    teacher.generation_config.repetition_penalty = 5.0  # would hide that it repeats itself
    assert side_by_side(teacher, student, tiny_tokenizer, begun) == plain
