"""Python in a process of its own, on this checkout: for what launches ranks, is killed, or must be a user's command."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python(
    *arguments: object, cwd: Path = ROOT, status: int = 0, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` to its end.

    Args:
        arguments: As typed.
        cwd: Where it runs.
        status: How it has to end.
        timeout: Seconds.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == status, done.stderr[-3000:]
    return done
