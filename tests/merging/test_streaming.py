"""A model whose weights stay on disk is planned and merged as the whole model is, bit for bit."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.collapse import execute
from lcprune.merging.concat import Concat
from lcprune.merging.criteria import AngularDistance, Criterion, OutputSimilarity, TrialPerplexity
from lcprune.merging.gradients import Magnitude, Taylor
from lcprune.merging.greedy import GreedyPlanner
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, Rdsc, ReplaceWithLast, WeightedAverage, spec_of
from lcprune.merging.planners import ContiguousBlock, FixedPlan, OneShotRanking, Planner, ThresholdPlanner
from lcprune.merging.shards import Shards
from lcprune.merging.streaming import (
    StoredModel,
    StreamedCalibration,
    check_planner,
    merged_tensors,
    stored_tensors,
    student_of,
)
from tests.builders import ALL_FAMILIES, FAMILIES, Family, tiny_llama
from tests.merging.planning import plain

FUSED: tuple[Family, ...] = ("mixtral", "qwen3_moe")
"""Families whose weights transformers fuses when it loads them."""
STREAMED = tuple(family for family in ALL_FAMILIES if family not in FUSED)
PLANNERS = (
    FixedPlan([[3, 4, 5], [1, 2]]),
    OneShotRanking(),
    OneShotRanking(AngularDistance()),
    OneShotRanking(Magnitude()),
    ContiguousBlock(),
)


def whole(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def stored(folder: Path, dtype: torch.dtype = torch.float32) -> StoredModel:
    return StoredModel(whole(folder).config, folder, dtype=dtype)


def saved(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    return folder


def streamed(model: StoredModel, batches: list[Batch]) -> StreamedCalibration:
    return StreamedCalibration(model.model, batches, stored=model)


def written(model: StoredModel, history: MergeHistory) -> dict[str, Tensor]:
    shapes = stored_tensors(student_of(model, history, model.dtype))
    flat = {name: torch.cat([piece.flatten() for piece in pieces]) for name, pieces in merged_tensors(model, history)}
    assert flat.keys() == shapes.keys()
    return {name: tensor.reshape(shapes[name].shape) for name, tensor in flat.items()}


def padded() -> list[Batch]:
    batches = [dict(batch) for batch in plain()]
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 10:] = 0
    return batches


@pytest.mark.parametrize("family", STREAMED)
def test_streamed_collapse_equals_the_ordinary_one_bit_for_bit(tmp_path: Path, family: Family):
    folder = saved(tmp_path, tiny_llama(model_type=family))
    ordinary, disk = whole(folder), stored(folder)
    steps = OneShotRanking().plan(Calibration(ordinary, plain()), Drop(), 4)
    assert OneShotRanking().plan(streamed(disk, plain()), Drop(), 4) == steps
    history = MergeHistory(6, steps)
    execute(ordinary, history)
    student = student_of(disk, history, torch.float32)
    assert student.config.to_dict() == ordinary.config.to_dict()
    torch.testing.assert_close(written(disk, history), stored_tensors(ordinary), rtol=0, atol=0)


@pytest.mark.parametrize("planner", PLANNERS, ids=str)
@pytest.mark.parametrize("batches", [plain(), padded()], ids=["plain", "padded"])
def test_plan_from_disk_is_the_plan_from_memory(tiny_folder: Path, planner: Planner, batches: list[Batch]):
    check_planner(planner)
    expected = planner.plan(Calibration(whole(tiny_folder), batches), Rdsc(), 3)
    assert planner.plan(streamed(stored(tiny_folder), batches), Rdsc(), 3) == expected


@pytest.mark.parametrize("operator", [Drop(), Drop("last"), Rdsc(), ReplaceWithLast(), WeightedAverage()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_and_merges_of_merges_equal_those_in_memory(
    tiny_folder: Path, operator: Operator, dtype: torch.dtype
):
    groups = ((3, 4), (1, 2, 3))
    shares = ((0.25, 0.75), (0.5, 0.25, 0.25))
    steps = tuple(MergeStep(group, spec_of(operator), share) for group, share in zip(groups, shares, strict=True))
    history, ordinary = MergeHistory(6, steps), whole(tiny_folder, dtype)
    execute(ordinary, history)
    actual = written(stored(tiny_folder, dtype), history)
    torch.testing.assert_close(actual, stored_tensors(ordinary), rtol=0, atol=0)


def test_statistics_of_several_spans_come_from_one_walk(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    calibration = streamed(stored(tiny_folder), plain())
    expected = Calibration(whole(tiny_folder), plain()).stats(1, 2, 5)
    assert calibration.stats(1, 2, 5) == expected
    monkeypatch.setattr(StoredModel, "stats", None)
    assert calibration.stats(2).angle[2] == expected.angle[2]


def test_statistics_leave_no_weights_and_no_files_behind(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    disk = stored(tiny_folder)
    before = {name: (parameter.device, parameter.shape) for name, parameter in disk.model.named_parameters()}
    disk.stats(plain(), (3,))
    assert {name: (p.device, p.shape) for name, p in disk.model.named_parameters()} == before
    assert sum(p.numel() for p in disk.model.parameters() if not p.is_meta) < 1000
    assert not list(tmp_path.iterdir())


def test_no_more_than_one_layer_is_held_while_statistics_are_taken(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    disk = stored(tiny_folder)
    held = []
    run = nn.Module.__call__

    def counting(module: nn.Module, *args: object, **kwargs: object) -> object:
        layers = disk.layout.layers_of(disk.model)
        held.append(sum(any(not p.is_meta for p in layer.parameters() if p.dim() > 1) for layer in layers))
        return run(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", counting)
    disk.stats(plain(), (1,))
    assert set(held) == {1}


def test_embeddings_of_other_tokens_are_not_read(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    disk = stored(tiny_folder)
    read, true_read = [], Shards.read

    def noting(shards: Shards, name: str) -> Tensor:
        read.append(name)
        return true_read(shards, name)

    monkeypatch.setattr(Shards, "read", noting)
    disk.stats([{"input_ids": torch.tensor([[5, 6, 90, 5]])}], (1,))
    assert "model.embed_tokens.weight" not in read
    assert "model.layers.5.mlp.down_proj.weight" in read


def test_weights_stored_without_the_prefix_of_the_causal_lm_are_found(tmp_path: Path):
    model = tiny_llama(model_type="gpt2")
    folder = saved(tmp_path, model)
    state = {name.removeprefix("transformer."): theta.clone() for name, theta in stored_tensors(model).items()}
    save_file(state, folder / "model.safetensors")
    history = MergeHistory(6, (MergeStep((1, 2), spec_of(Drop()), (1, 0)),))
    execute(model, history)
    torch.testing.assert_close(written(stored(folder), history), stored_tensors(model), rtol=0, atol=0)


@pytest.mark.parametrize("equal", [True, False])
def test_second_copy_of_a_tied_head_must_be_equal(tmp_path: Path, equal: bool):
    model = tiny_llama()
    folder, config = saved(tmp_path, model), copy.deepcopy(model.config)
    state = {name: theta.clone() for name, theta in model.state_dict().items()}
    state["lm_head.weight"] += 0 if equal else 1
    save_file(state, folder / "model.safetensors")
    if equal:
        assert len(stored_tensors(StoredModel(config, folder, dtype=torch.float32).model)) == len(state) - 1
    else:
        with pytest.raises(InputError, match="tie_word_embeddings"):
            StoredModel(config, folder, dtype=torch.float32)


@pytest.mark.parametrize("family", FUSED)
def test_weights_that_loading_would_fuse_are_refused(tmp_path: Path, family: Family):
    with pytest.raises(InputError, match="fused"):
        stored(saved(tmp_path, tiny_llama(model_type=family)))


def test_files_of_another_model_are_refused(tmp_path: Path):
    config = tiny_llama(8).config
    with pytest.raises(InputError, match=r"not under its name: model\.layers\.6"):
        StoredModel(config, saved(tmp_path, tiny_llama()), dtype=torch.float32)
    config = tiny_llama().config
    config.intermediate_size = 48
    with pytest.raises(InputError, match="of another shape"):
        StoredModel(config, tmp_path, dtype=torch.float32)


def test_quantised_model_is_refused(tiny_folder: Path):
    config = tiny_llama().config
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(InputError, match="quantised"):
        StoredModel(config, tiny_folder, dtype=torch.float32)


@pytest.mark.parametrize("criterion", [OutputSimilarity(), TrialPerplexity(), Taylor()], ids=str)
def test_criteria_that_run_the_whole_model_are_refused(criterion: Criterion):
    with pytest.raises(InputError, match=r"criterion=.*OneShotRanking.*BlockInfluence, AngularDistance, Magnitude"):
        check_planner(OneShotRanking(criterion))


@pytest.mark.parametrize("planner", [ThresholdPlanner(), GreedyPlanner()], ids=str)
def test_planners_that_try_merges_out_are_refused(planner: Planner):
    with pytest.raises(InputError, match="FixedPlan, OneShotRanking, ContiguousBlock"):
        check_planner(planner)


def step(operator: Operator, **changes: object) -> MergeHistory:
    return MergeHistory(6, (MergeStep((1, 2), spec_of(operator), (1, 0), **changes),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (MergeHistory(7), "teacher_depth=7"),
        (step(Concat()), "Concat"),
        (step(Drop(), refit={"class_path": "RidgeRefit"}), "refits"),
    ],
)
def test_plans_that_need_the_whole_model_are_refused(tiny_folder: Path, history: MergeHistory, message: str):
    with pytest.raises(InputError, match=message):
        student_of(stored(tiny_folder), history, torch.float32)


def test_untied_head_and_sharded_files_are_read(tmp_path: Path):
    model = tiny_llama(tied=False)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*"))) > 3
    history = step(Rdsc())
    execute(model, history)
    torch.testing.assert_close(written(stored(tmp_path), history), stored_tensors(model), rtol=0, atol=0)


def test_families_of_every_suite_are_streamed():
    assert set(FAMILIES) <= set(STREAMED)
