"""What a user types, on a CUDA GPU: the same as on a CPU, and what only a GPU can do. Run with `pytest -m gpu`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lcprune.cli import main
from lcprune.distillation.module import DistillationModule
from tests import builders, processes
from tests.cli.recipe import recipe, text_file, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # of a card's own and of drivers: what is tested is the outcome
]
FUSED = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "fused": True}}


def _config(model: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    usual = {"trainer__accelerator": "gpu", "trainer__devices": 1, "model__optimizer": FUSED}
    return write(folder, recipe(model, text_file(folder), folder / "run", **usual | changes))


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A Llama whose projections have whole blocks of 64 inputs, as bitsandbytes packs them."""
    config = builders.tiny_config()
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return builders.save_tiny(tmp_path / "model", AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def _fit(model: Path, folder: Path, *options: str, **changes: Any) -> dict[str, torch.Tensor]:
    assert main(["fit", "--config", str(_config(model, folder, **changes)), *options]) == 0
    student = AutoModelForCausalLM.from_pretrained(folder / "run" / "student")
    assert student.config.num_hidden_layers == 4
    return load_file(folder / "run" / "student" / "model.safetensors")


def test_run_on_a_gpu_ends_near_the_one_on_the_cpu(tiny_folder: Path, tmp_path: Path):
    gpu = _fit(tiny_folder, tmp_path / "gpu")
    cpu = _fit(tiny_folder, tmp_path / "cpu", trainer__accelerator="cpu")
    for name, weight in cpu.items():
        torch.testing.assert_close(gpu[name], weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer__precision": "bf16-mixed"},
        {"trainer__precision": "bf16-true"},
        {"trainer__precision": "16-mixed", "trainer__gradient_clip_val": 1.0},
        {"trainer__precision": "bf16-mixed", "model__activations": "recompute", "model__train": "after_merge"},
        {"trainer__precision": "bf16-mixed", "model__compile_layers": True},
        {"trainer__precision": "bf16-mixed", "model__train": "lora", "model__lora": {"rank": 4, "base": "nf4"}},
        {"model__teacher_dtype": "int8"},
        {"model__teacher_dtype": "nf4", "model__train": "after_merge"},
        {"model__optimizer": {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 1e-3}}},
        {"model__kernels": "liger", "trainer__precision": "bf16-mixed"},
        {"model__kernels": "liger", "trainer__precision": "bf16-mixed", "model__activations": "recompute"},
    ],
    ids=lambda changes: ",".join(f"{name.partition('__')[2]}={value}"[:40] for name, value in changes.items()),
)
def test_settings_of_a_gpu_run_to_the_end(tiny_folder: Path, tmp_path: Path, changes: dict[str, Any]):
    if changes.get("model__kernels") == "liger":
        pytest.importorskip("liger_kernel")
    weights = _fit(tiny_folder, tmp_path / "run", **changes)
    assert all(weight.isfinite().all() for weight in weights.values())


def test_run_in_shards_on_one_gpu(tiny_folder: Path, tmp_path: Path):
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 1, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
    }
    config = _config(tiny_folder, tmp_path / "run", trainer__strategy=strategy, trainer__precision="bf16-mixed")
    processes.python("-m", "lcprune", "fit", "--config", config)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "run" / "student").config.num_hidden_layers == 4


def test_run_that_is_stopped_on_a_gpu_ends_bitwise_like_the_whole_one(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    same = {"trainer__deterministic": True, "trainer__precision": "bf16-mixed"}
    saving = {"save_last": True, "every_n_train_steps": 1, "save_top_k": 0}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    ends = {}
    for name in ("whole", "stopped"):
        config = _config(tiny_folder, tmp_path / name, **same, trainer__callbacks=[callback])
        command = ("-m", "lcprune", "fit", "--config", config)
        if name == "stopped":
            processes.python(*command, "--trainer.max_steps", 4, "--model.lr_scheduler", "null")
            processes.python(*command, "--ckpt_path", "last", "--model.lr_scheduler", "null")
        else:
            processes.python(*command, "--model.lr_scheduler", "null")
        ends[name] = load_file(tmp_path / name / "run" / "student" / "model.safetensors")
    assert all(torch.equal(ends["stopped"][name], weight) for name, weight in ends["whole"].items())


def test_memory_that_a_gpu_has_not_is_one_sentence(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def step(self: DistillationModule, *_: object) -> torch.Tensor:
        return torch.empty(10**13, device=self.device)

    monkeypatch.setattr(DistillationModule, "training_step", step)
    assert main(["fit", "--config", str(_config(tiny_folder, tmp_path / "run"))]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lcprune: ")]
    assert len(said) == 1
    assert "not enough memory (" in said[0]
    assert "lower data.batch_size" in said[0]


@pytest.mark.parametrize("options", [[], ["--stream"], ["--dtype", "bfloat16"]], ids=["whole", "stream", "bfloat16"])
def test_collapse_on_a_gpu_is_that_on_the_cpu(tiny_folder: Path, tmp_path: Path, options: list[str]):
    refit = {} if options == ["--stream"] else {"collapse__refit": "RidgeRefit", "collapse__operator": "Concat"}
    config = str(_config(tiny_folder, tmp_path / "recipe", **refit))
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        assert main(["collapse", "--config", config, "--device", device, "--out", str(out), *options]) == 0
        found[device] = load_file(out / "model.safetensors"), json.loads((out / "history.json").read_text())["steps"]
    assert [step["group"] for step in found["cpu"][1]] == [step["group"] for step in found["cuda"][1]]
    near = 5e-2 if "bfloat16" in options else 1e-3
    for name, weight in found["cpu"][0].items():
        other = found["cuda"][0][name]
        assert (other.float() - weight.float()).norm() <= near * weight.float().norm(), name


def test_evaluate_and_report_on_a_gpu(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _fit(tiny_folder, tmp_path, trainer__precision="bf16-mixed")
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cuda"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "cuda" in json.dumps(found).lower() or "nvidia" in json.dumps(found).lower()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_cache_made_on_a_gpu_serves_a_run_there(tiny_folder: Path, tmp_path: Path):
    config = _config(tiny_folder, tmp_path, model__objective=[{"class_path": "Logits"}])
    cache = tmp_path / "cache"
    assert main(["cache", "--config", str(config), "--out", str(cache)]) == 0
    _fit(tiny_folder, tmp_path, "--model.teacher_cache", str(cache), model__objective=[{"class_path": "Logits"}])


def test_text_that_the_teacher_writes_on_a_gpu_is_learned_from(tiny_folder: Path, tmp_path: Path):
    generate = {"documents": 16, "tokens": 48}
    config = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", trainer__accelerator="gpu")
    config["data"] = {"generate": generate, "block_size": 16, "batch_size": 4, "calibration_blocks": 4}
    assert main(["fit", "--config", str(write(tmp_path, config))]) == 0
