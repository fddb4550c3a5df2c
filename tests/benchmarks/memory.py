"""How much memory this process holds, and the most that it has held."""

import resource
import sys
from pathlib import Path
from typing import Literal


def resident(what: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of resident memory, now (VmRSS) or at most (VmHWM); where there is no /proc, at most in either case."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # Not getrusage's on Linux: that one begins with what the parent had when it started this process.
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024
