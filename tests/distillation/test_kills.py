"""The benchmark of random kills, small: every run that was killed and resumed ends like the one that nobody stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "processes"), [(3, 1), (2, 2)])
def test_killed_runs_end_like_the_one_that_nobody_stopped(kills: int, processes: int):
    script = ROOT / "tests" / "benchmarks" / "kills.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--kills", str(kills), "--processes", str(processes)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["kills"], result["resumes"], result["bitwise_equal"]) == (kills, kills, True)
    assert result["torn_checkpoints"] == 0
    assert result["slowest_end_of_the_others"] < 60
