"""What cannot be in shards is refused in one sentence before anything is loaded; two processes are in test_ranks.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from lcprune import AtSteps, ProgressiveCollapse
from lcprune.distillation import beforehand
from lcprune.distillation.levels import Boundary, Labels, Level, Local, Logits
from lcprune.distillation.phases import Phase
from lcprune.distillation.sharded import Shards
from lcprune.distillation.strategies import check_merges
from lcprune.errors import InputError
from lcprune.merging.surgery import Outcome
from tests.distillation import runs

FSDP2 = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


@pytest.mark.parametrize(
    ("strategy", "precision", "levels", "others", "expected"),
    [
        (FSDP2, "32-true", [Logits(), Local()], {}, ["the level Local"]),
        (FSDP2, "32-true", [Labels(), Boundary()], {}, ["an objective without Logits"]),
        (FSDP2, "16-true", [Logits()], {}, ["trainer.precision=16-true"]),
        (FSDP2, "bf16-mixed", [Logits()], {"model.lora": True, "model.teacher_cache": False}, ["model.lora"]),
        (ModelParallelStrategy(), "32-true", [Logits()], {"a": True}, ["a, nor with a tensor_parallel_size other"]),
    ],
)
def test_setting_that_does_not_go_with_shards_is_refused(
    strategy: ModelParallelStrategy, precision: str, levels: list[Level], others: dict[str, bool], expected: list[str]
):
    with pytest.raises(InputError) as refusal:
        beforehand.check_sharding(strategy, precision, [Phase(levels)], others)
    assert all(part in str(refusal.value) for part in expected)
    assert "model.teacher_cache" not in str(refusal.value)
    beforehand.check_sharding(DDPStrategy(), precision, [Phase(levels)], others)


def test_shards_allow_what_is_known_to_work():
    beforehand.check_sharding(FSDP2, "bf16-mixed", [Phase([Logits(), Boundary()])], {"model.lora": False})
    check_merges(FSDP2)


def test_tensor_parallel_layers_do_not_merge_while_they_train():
    with pytest.raises(InputError, match=r"tensor_parallel_size=2 cannot merge .*`lcprune collapse-checkpoint IN OUT`"):
        check_merges(ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2))


def test_outcome_of_a_merge_is_told_in_the_parameters_that_the_optimizer_holds():
    full, held, other = (nn.Parameter() for _ in range(3))
    outcome = Shards({id(full): held}).of(Outcome((full,), (other,)))
    assert outcome.merged[0] is held
    assert outcome.removed[0] is other


def test_merges_in_shards_cannot_be_taken_back(tiny_folder: Path):
    collapse = ProgressiveCollapse(AtSteps({1: 5}), max_perplexity_jump=1.5)
    trainer = SimpleNamespace(
        strategy=FSDP2, precision="32-true", fast_dev_run=False, max_steps=4, callbacks=[], limit_val_batches=1.0
    )
    with pytest.raises(InputError, match=r"max_perplexity_jump=1\.5 takes merges back.*set it to null"):
        collapse.check(trainer, runs.student_of(tiny_folder))  # type: ignore[arg-type]
