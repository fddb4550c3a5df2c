"""The state of the random number generators as plain data: Lightning saves none, and a resume needs them all."""

import random

import numpy
import torch

RngState = dict[str, object]
"""Generator -> state, in types that a checkpoint read with `weights_only=True` may hold."""


def rng_state() -> RngState:
    """The state of Python's, numpy's and torch's generators in this process."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng_state(state: RngState) -> None:
    """Puts back what `rng_state` returned; GPUs only where their number is the same."""
    version, internal, gauss_next = state["python"]  # type: ignore[misc]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, *rest = state["numpy"]  # type: ignore[misc]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])  # type: ignore[arg-type]
    cuda = state["cuda"]
    assert isinstance(cuda, list)
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
