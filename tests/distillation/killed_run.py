"""A run that kills itself at a merge: `killed_run.py FOLDER TEACHER TEXT before|at|inside|after`. Goes on where it was.

`inside` dies in the middle of the first merge: student and history are changed, the optimizer is not.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from lcprune.distillation import optim
from tests.distillation import runs


def die(*_: object) -> None:
    """No cleaning up, no last words."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, teacher, text = map(Path, sys.argv[1:4])
    point = sys.argv[4]
    if point == "inside":
        optim.carry_over = die
    runs.resumable(folder, teacher, text, runs.Interrupt(3, point, die), resume=(folder / "last.ckpt").exists())
