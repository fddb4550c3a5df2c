"""Double precision and devices without it; `meta` stands in for such a device."""

import ast
from pathlib import Path

import pytest
import torch

import lcprune
from lcprune.distillation.metrics import HeldOut
from lcprune.merging import double
from lcprune.merging.regression import Sums

SOURCES = Path(lcprune.__file__).parent
THE_ONE = SOURCES / "merging" / "double.py"


def test_total_counts_in_double_precision():
    # 2 ** 24 is the first whole number after which float32 leaves some out.
    assert double.total(torch.tensor([2.0**24, 1.0])) == 2**24 + 1


@pytest.mark.parametrize(("device", "expected"), [("mps", "cpu"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_doubles_stay_where_they_can(device: str, expected: str):
    assert double.device_of_doubles(torch.device(device)) == torch.device(expected)


def test_sums_of_a_device_without_doubles_are_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(double, "SINGLE_ONLY", ("meta",))
    sums = Sums.zeros(3, 2, torch.device("meta"))
    assert sums.gram_II.device == sums.cross_ID.device == torch.device("cpu")


def test_metrics_move_to_a_device_without_doubles_and_keep_their_sums(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(double, "SINGLE_ONLY", ("meta",))
    metric = HeldOut()
    metric.tokens += 2**24 + 1
    metric.to("meta")
    assert metric.device == torch.device("meta")
    assert (metric.tokens.item(), metric.nats.dtype, metric.nats.device.type) == (2**24 + 1, torch.float64, "cpu")
    metric.reset()
    assert (metric.tokens.item(), metric.tokens.device.type) == (0, "cpu")


@pytest.mark.parametrize("path", [path for path in sorted(SOURCES.rglob("*.py")) if path != THE_ONE], ids=str)
def test_nothing_is_made_double_where_it_may_be_on_any_device(path: Path):
    """`.double()` only of what `.cpu()` has brought or is there anyway, and no sums of `dtype=torch.float64`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr == "double":
            before = ast.unparse(node.func.value)
            assert before.endswith(".cpu()") or before in ON_THE_CPU, f"line {node.lineno}: {before}.double()"
        if node.func.attr in ("sum", "mean", "to"):
            assert "float64" not in ast.unparse(node), f"line {node.lineno}: {ast.unparse(node)}"


ON_THE_CPU = ("tensors['log_tail']",)
"""Read from a file."""
