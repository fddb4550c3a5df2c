"""The benchmark of random kills, small: every run that was killed and resumed ends like the one that nobody stopped."""

import json

import pytest

from tests.processes import ROOT, python


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "processes"), [(3, 1), (2, 2)])
def test_killed_runs_end_like_the_one_that_nobody_stopped(kills: int, processes: int):
    script = ROOT / "tests" / "benchmarks" / "kills.py"
    done = python(script, "--kills", kills, "--processes", processes, timeout=900)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["kills"], result["resumes"], result["bitwise_equal"]) == (kills, kills, True)
    assert result["torn_checkpoints"] == 0
    assert result["slowest_end_of_the_others"] < 60
