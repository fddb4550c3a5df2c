"""Two processes stay one model through merges. What a rank with another plan meets is in test_callbacks.py."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from lcprune.distillation.checkpoint import read

ROOT = Path(__file__).parents[2]


def test_two_ranks_have_one_student_after_two_merges(tiny_folder: Path, text: Path, tmp_path: Path):
    script = ROOT / "tests" / "distillation" / "ddp_run.py"
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path), str(tiny_folder), str(text)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
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
