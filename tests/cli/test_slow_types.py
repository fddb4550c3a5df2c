"""bfloat16 on a CPU without instructions for it: said before the work begins, with what is faster."""

from pathlib import Path

import pytest
import torch

from lcprune.cli import main
from lcprune.distillation.beforehand import say_if_slow
from tests.cli.recipe import recipe, text_file, write

SAID = "has no instructions for bfloat16"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for bfloat16."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False, raising=False)


@pytest.mark.parametrize(
    ("device", "machine", "supported", "said"),
    [
        ("cpu", "x86_64", False, True),
        ("cpu", "AMD64", False, True),
        ("cpu", "x86_64", True, False),
        ("cpu", "arm64", False, False),
        ("cuda", "x86_64", False, False),
    ],
)
@pytest.mark.parametrize("capability", ["DEFAULT", "NO AVX", "AVX2", "AVX512"])
def test_only_a_cpu_without_instructions_is_told_of(
    device: str,
    machine: str,
    supported: bool,
    said: bool,
    capability: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: supported, raising=False)
    with caplog.at_level("INFO"):
        say_if_slow(torch.device(device), "trainer.precision=bf16-mixed", "--trainer.precision 32-true")
    assert (SAID in caplog.text) == said
    assert ("--trainer.precision 32-true is faster here" in caplog.text) == said


@pytest.mark.parametrize(
    ("capability", "said"), [("DEFAULT", True), ("NO AVX", True), ("AVX2", True), ("AVX512", False)]
)
def test_a_torch_that_cannot_tell_is_silent_where_there_may_be_instructions(
    capability: str, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported", raising=False)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    with caplog.at_level("INFO"):
        say_if_slow(torch.device("cpu"), "--dtype bfloat16", "--dtype float32")
    assert (SAID in caplog.text) == said


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(("precision", "said"), [("bf16-mixed", True), ("32-true", False)])
def test_fit_says_so_where_it_computes_in_bfloat16(
    precision: str,
    said: bool,
    tiny_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", trainer__precision=precision)
    caplog.set_level("INFO")
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    assert (SAID in caplog.text) == said


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("float32", False)])
def test_collapse_says_so_where_it_computes_in_bfloat16(
    dtype: str,
    said: bool,
    tiny_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    config = write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run"))
    command = ["collapse", "--config", str(config), "--out", str(tmp_path / "short"), "--device", "cpu"]
    caplog.set_level("INFO")
    assert main([*command, "--dtype", dtype]) == 0
    assert (SAID in caplog.text) == said
