"""A rank that Lightning has launched ends when the process that launched it is gone.

Lightning watches the ranks that it launches from rank 0 and ends all when one dies; nobody watches rank 0. Without it
the others wait in the middle of an exchange, with NCCL for ten minutes and more, and hold their GPUs. torchrun and
SLURM watch all of theirs.
"""

import os
import threading
import time

from lcprune.cli.failures import RANK_0_IS_GONE

WATCHED_ELSEWHERE = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID")
"""Set by launchers that end all ranks by themselves."""


def end_with_launcher(every: float = 2.0) -> None:
    """Watches the launcher from a thread, if this process is one that Lightning has launched.

    Args:
        every: Seconds between two looks.
    """
    launched = os.environ.get("LOCAL_RANK", "0") != "0"
    if launched and not any(name in os.environ for name in WATCHED_ELSEWHERE):
        threading.Thread(target=_watch, args=(os.getppid(), every), daemon=True, name="launcher-watch").start()


def _watch(launcher: int, every: float) -> None:
    while os.getppid() == launcher:
        time.sleep(every)
    os.write(2, f"lcprune: {RANK_0_IS_GONE}\n".encode())
    os._exit(1)  # the main thread may never come back from its exchange
