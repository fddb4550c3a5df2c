"""The state of the random number generators as plain data: Lightning saves none, and a resume needs them all."""

import random
from typing import TypedDict

import numpy
import torch
from torch import Tensor


class RngState(TypedDict):
    """One process's generators, in types that a checkpoint read with `weights_only=True` may hold."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[list[int], int, int, float]
    torch: Tensor
    cuda: list[Tensor]


def rng_state() -> RngState:
    """The state of Python's, numpy's and torch's generators in this process."""
    version, internal, gauss_next = random.getstate()
    legacy = numpy.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    return {
        "python": (version, internal, gauss_next),
        "numpy": (legacy["state"]["key"].tolist(), legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def states_of_ranks(own: RngState) -> tuple[RngState, ...]:
    """The state of every rank, in order, from that of this one; all ranks have to ask."""
    states = [own]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        states = states * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, own)
    return tuple(states)


def restore_rng_state(state: RngState) -> None:
    """Puts back what `rng_state` returned; GPUs only where their number is the same."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
