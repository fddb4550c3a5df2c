"""Double precision where the hardware has it: Apple's GPUs have none, and what needs it goes to the CPU from there."""

import torch
from torch import Tensor

SINGLE_ONLY = ("mps",)
"""Types of devices without float64."""


def device_of_doubles(device: torch.device) -> torch.device:
    """Where float64 goes with values on this device: there, or to the CPU."""
    return torch.device("cpu") if device.type in SINGLE_ONLY else device


def in_double(values: Tensor) -> Tensor:
    """The values in float64, on their own device if that can be."""
    return values.to(device_of_doubles(values.device)).double()


def total(values: Tensor) -> float:
    """The sum, taken in float64."""
    return values.to(device_of_doubles(values.device)).sum(dtype=torch.float64).item()
