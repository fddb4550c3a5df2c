"""bfloat16 on a CPU without instructions for it: said before the work begins, with what is faster."""

from pathlib import Path

import pytest
import torch

from lcprune.cli import main
from lcprune.distillation.beforehand import say_if_slow
from tests.cli.recipe import recipe, text_file, write

SAID = "has no instructions for bfloat16"


@pytest.mark.parametrize(
    ("device", "capability", "said"), [("cpu", "AVX2", True), ("cpu", "AVX512", False), ("cuda", "AVX2", False)]
)
def test_only_a_cpu_without_instructions_is_told_of(
    device: str, capability: str, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    with caplog.at_level("INFO"):
        say_if_slow(torch.device(device), "trainer.precision=bf16-mixed", "--trainer.precision 32-true")
    assert (SAID in caplog.text) == said
    assert ("--trainer.precision 32-true is faster here" in caplog.text) == said


@pytest.mark.parametrize(("precision", "said"), [("bf16-mixed", True), ("32-true", False)])
def test_fit_says_so_where_it_computes_in_bfloat16(
    precision: str,
    said: bool,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", trainer__precision=precision)
    caplog.set_level("INFO")
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    assert (SAID in caplog.text) == said


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("float32", False)])
def test_collapse_says_so_where_it_computes_in_bfloat16(
    dtype: str,
    said: bool,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    command = ["collapse", "--config", str(config), "--out", str(tmp_path / "short"), "--device", "cpu"]
    caplog.set_level("INFO")
    assert main([*command, "--dtype", dtype]) == 0
    assert (SAID in caplog.text) == said
