"""Two processes stay one model through merges. What a rank with another plan meets is in test_callbacks.py."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import callbacks

from lcprune.distillation.checkpoint import read
from tests.processes import ROOT, python


def _ranks(script: str, folder: Path, teacher: Path, text: Path) -> list[dict[str, Any]]:
    """What the two processes of a script have written."""
    python(ROOT / "tests" / "distillation" / script, folder, teacher, text, timeout=300)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_two_ranks_have_one_student_after_two_merges(tiny_folder: Path, text: Path, tmp_path: Path):
    first, second = _ranks("ddp_run.py", tmp_path, tiny_folder, text)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["weights"] == second["weights"]
    assert first["history"] == second["history"]
    assert first["groups"] == second["groups"] == [[1, 2], [1, 2]]
    assert first["held"] == second["held"] == [4 * 9 + 2]
    assert first["wrapped"] == second["wrapped"] == 4 * 9 + 2
    assert first["losses"] != second["losses"]  # each saw its own half of the batch
    assert all(math.isfinite(loss) for rank in (first, second) for loss in rank["losses"].values())
    record = read(tmp_path / "last.ckpt")
    assert record.history.digest == first["history"]
    assert len(record.rng) == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="came with lightning 2.6")
def test_ranks_that_measure_otherwise_decide_alike(tiny_folder: Path, text: Path, tmp_path: Path):
    first, second = _ranks("ddp_recovered.py", tmp_path, tiny_folder, text)
    assert first == second
    assert first["merged"] == [3, 7]  # validated at 4 and 6, without a gain on rank 0
    assert first["refused"] == []
    assert first["tokens"] == 12 * 2 * 2 * 16
