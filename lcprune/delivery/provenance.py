"""Where, when and with what a report was made."""

import os
import platform
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("lcprune", "torch", "transformers", "lightning", "matplotlib")


@dataclass(frozen=True)
class Provenance:
    """The circumstances."""

    date: str
    """Local time, to the minute."""
    packages: tuple[tuple[str, str], ...]
    """Names and versions of what is installed, this package first."""
    machine: str
    """Processor, cores and accelerator."""


def here_and_now() -> Provenance:
    """Of this process."""
    packages = [(name, found) for name in PACKAGES if (found := _version(name))]
    packages.append(("Python", platform.python_version()))
    return Provenance(datetime.now().strftime("%Y-%m-%d %H:%M"), tuple(packages), _machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _machine() -> str:
    cores = os.cpu_count() or 1
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([f"{processor()}, {cores} core{'s' * (cores != 1)}", *cards, platform.system()])


def processor() -> str:
    """The name as Linux has it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
