"""`lcprune fit` under FSDP2 from the command line: a run in shards, resumed from a folder, exported as a plain one."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lcprune.distillation.checkpoint import read
from lcprune.merging.lineage import MergeHistory
from tests.cli.recipe import recipe, text_file, write
from tests.processes import python


def fit(config: Path, *options: str) -> None:
    python("-m", "lcprune", "fit", "--config", config, *options)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_run_in_shards_goes_on_from_a_folder_and_is_exported_whole(tiny_folder: Path, tmp_path: Path, processes: int):
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {
            "data_parallel_size": processes,
            "tensor_parallel_size": 1,
            "save_distributed_checkpoint": True,
        },
    }
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", trainer__strategy=strategy)
    content["trainer"]["devices"] = processes  # type: ignore[index]
    config = write(tmp_path, content)
    fit(config, "--trainer.max_steps", "5")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert checkpoint.is_dir()
    assert read(checkpoint).history.depth == 4
    fit(config, "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "student"))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 4
    history = MergeHistory.load(tmp_path / "student" / "history.json")
    assert [step.global_step for step in history.steps] == [0, 3]
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
