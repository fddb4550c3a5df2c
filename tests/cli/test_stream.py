"""`collapse --stream` does what `collapse` does, for models that do not fit into memory."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lcprune.cli import main, options
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.shards import ShardWriter
from tests.benchmarks.stream import Size, save_large
from tests.builders import save_tiny, tiny_llama
from tests.cli.recipe import recipe, text_file, write
from tests.merging.planning import overflowing

pytestmark = pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> str:
    return str(write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run")))


def changed(tmp_path: Path, model: Path, **changes: object) -> str:
    return str(write(tmp_path, recipe(model, text_file(tmp_path), tmp_path / "run", **changes)))


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_folders(streamed: Path, ordinary: Path) -> None:
    names = sorted(path.name for path in ordinary.iterdir())
    assert sorted(path.name for path in streamed.iterdir()) == names
    torch.testing.assert_close(weights(streamed), weights(ordinary), rtol=0, atol=0)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "history.json", "recipe.yaml"):
        assert (streamed / name).read_text() == (ordinary / name).read_text(), name


@pytest.mark.parametrize("operator", ["Drop", "Rdsc", "ReplaceWithLast", "WeightedAverage"])
def test_streamed_folder_equals_the_ordinary_one(tiny_folder: Path, tmp_path: Path, operator: str):
    config = changed(tmp_path, tiny_folder, collapse__operator=operator)
    out, streamed = tmp_path / "out", tmp_path / "streamed"
    assert main(["collapse", "--config", config, "--out", str(out)]) == 0
    assert main(["collapse", "--config", config, "--out", str(streamed), "--stream"]) == 0
    assert_equal_folders(streamed, out)


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_a_plan_in_half_precision_does_not_round_what_it_keeps(
    tiny_folder: Path, config: str, tmp_path: Path, flags: list[str]
):
    out = tmp_path / "out"
    assert main(["collapse", "--config", config, "--dtype", "bfloat16", "--out", str(out), *flags]) == 0
    kept, original = weights(out), weights(tiny_folder)
    group = MergeHistory.load(out / "history.json").lineage
    for name in original:
        if not name.startswith("model.layers."):
            assert torch.equal(kept[name], original[name]), name
    for place, ancestors in enumerate(group):
        if len(ancestors) == 1:
            name = f"model.layers.{place}.mlp.down_proj.weight"
            assert torch.equal(kept[name], original[name.replace(f".{place}.", f".{ancestors[0]}.", 1)]), name


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_stream_that_leaves_half_precision_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
):
    out, config = tmp_path / "out", changed(tmp_path, save_tiny(tmp_path / "model", overflowing()))
    assert main(["collapse", "--config", config, "--dtype", "float16", "--out", str(out), *flags]) == 2
    assert "The stream behind layer 2 is no number in float16: choose bfloat16" in capsys.readouterr().err
    assert not out.exists()


def test_experts_that_cannot_be_read_one_by_one_are_said_to_be_rounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    model = save_tiny(tmp_path / "model", tiny_llama(model_type="mixtral"))
    out = tmp_path / "out"
    config = changed(tmp_path, model)
    said: list[str] = []
    load = options.load_model

    def load_model(*given: object) -> object:
        said.append(capsys.readouterr().err)
        return load(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(options, "load_model", load_model)
    assert main(["collapse", "--config", config, "--dtype", "bfloat16", "--out", str(out)]) == 0
    lines = [line for line in said[0].splitlines() if line.startswith("lcprune: ")]
    assert len(lines) == 1
    assert "all weights of the student will be rounded to torch.bfloat16, without --dtype none is: " in lines[0]
    assert lines[0].endswith("cannot be read layer by layer.")
    assert "all weights" not in capsys.readouterr().err
    assert (out / "config.json").is_file()


@pytest.mark.parametrize(("model_type", "tied"), [("qwen2", False), ("gpt2", True), ("gemma3_text", True)])
def test_streamed_folder_equals_the_ordinary_one_in_half_precision(tmp_path: Path, model_type: str, tied: bool):
    model = tiny_llama(tied=tied, model_type=model_type, dtype=torch.bfloat16)  # type: ignore[arg-type]
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    config = changed(tmp_path, save_tiny(tmp_path / "model", model))
    outs = tmp_path / "out", tmp_path / "streamed"
    for out, flags in zip(outs, ([], ["--stream"]), strict=True):
        assert main(["collapse", "--config", config, "--dtype", "bfloat16", "--out", str(out), *flags]) == 0
    assert_equal_folders(outs[1], outs[0])
    assert GenerationConfig.from_pretrained(outs[1]).temperature == 0.5


def test_streamed_folder_loads_and_generates(config: str, tmp_path: Path):
    out = tmp_path / "short"
    assert main(["collapse", "--config", config, "--stream", "--target-depth", "3", "--out", str(out)]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.num_hidden_layers == MergeHistory.load(out / "history.json").depth == 3
    assert "layer" in (out / "README.md").read_text()
    inputs = tokenizer("layer", return_tensors="pt")
    cached, plain = (
        model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_plan_made_by_streaming_is_the_ordinary_one_and_can_be_executed_by_streaming(config: str, tmp_path: Path):
    plans, out = (tmp_path / "plan.json", tmp_path / "streamed.json"), tmp_path / "short"
    assert main(["collapse", "--config", config, "--plan-only", "--out", str(plans[0])]) == 0
    assert main(["collapse", "--config", config, "--plan-only", "--stream", "--out", str(plans[1])]) == 0
    assert plans[0].read_text() == plans[1].read_text()
    assert main(["collapse", "--config", config, "--plan", str(plans[1]), "--stream", "--out", str(out)]) == 0
    assert MergeHistory.load(out / "history.json") == MergeHistory.load(plans[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collapse__planner": "ThresholdPlanner"}, "planner=ThresholdPlanner"),
        (
            {"collapse__planner": {"class_path": "OneShotRanking", "init_args": {"criterion": "TrialPerplexity"}}},
            "criterion=TrialPerplexity",
        ),
        ({"collapse__operator": "Concat"}, "Concat"),
        ({"collapse__refit": "MagnitudeCompensation"}, "collapse.refit=MagnitudeCompensation"),
    ],
)
def test_what_needs_the_whole_model_is_refused_in_a_sentence(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    message: str,
):
    config = changed(tmp_path, tiny_folder, **changes)
    assert main(["collapse", "--config", config, "--stream", "--out", str(tmp_path / "short")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "leave --stream out" in error
    assert not (tmp_path / "short").exists()


def test_pickled_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert main(["collapse", "--config", changed(tmp_path, folder), "--stream", "--out", str(tmp_path / "short")]) == 2
    assert "pytorch_model.bin" in capsys.readouterr().err


def test_full_disk_leaves_nothing_behind(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    before = {path.name for path in tmp_path.iterdir()}
    true_write, written = ShardWriter.write, []

    def write_until_full(writer: ShardWriter, name: str, pieces: Iterable[Tensor]) -> None:
        if len(written) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(name)
        true_write(writer, name, pieces)

    monkeypatch.setattr(ShardWriter, "write", write_until_full)
    assert main(["collapse", "--config", config, "--stream", "--out", str(tmp_path / "short")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_kill_leaves_no_folder_under_the_name_asked_for(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "short"
    monkeypatch.setattr(ShardWriter, "verify", lambda writer: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["collapse", "--config", config, "--stream", "--out", str(out)]) == 130
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".short")]


ALONE = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
"""Nothing reserves address space for later."""


def _mapped_by_libraries() -> int:
    """Bytes of address space of a process that has imported the command."""
    code = (
        "import lcprune.cli.merging; print(*(line for line in open('/proc/self/status') if line.startswith('VmPeak')))"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **ALONE}, capture_output=True, text=True)
    return int(done.stdout.split()[1]) * 1024


@pytest.mark.slow
def test_model_larger_than_the_memory_limit_is_collapsed(tmp_path: Path):
    """Under 1.2 GB of address space where libraries map 0.8 of it, and as much more as they map more here."""
    limit = _mapped_by_libraries() + 400_000_000
    folder = save_large(tmp_path / "model", Size(hidden=1024, channels=2816, layers=44))
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 2e9
    config = changed(tmp_path, folder, data__batch_size=1, data__block_size=256, trainer__max_steps=1)
    out = tmp_path / "short"

    def collapse(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lcprune", "collapse", "--config", config, "--target-depth", "14"]
        return subprocess.run(
            [*command, "--out", str(out), *flags],
            cwd=tmp_path,
            env={**os.environ, **ALONE},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
            capture_output=True,
            text=True,
            timeout=900,
        )

    ordinary = collapse()
    assert ordinary.returncode != 0
    assert not out.exists()
    streamed = collapse("--stream")
    assert streamed.returncode == 0, streamed.stderr[-3000:]
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 14
    assert set(weights(out)) == set(AutoModelForCausalLM.from_pretrained(out).state_dict())
    shutil.rmtree(out)
