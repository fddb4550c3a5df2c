"""A loss or a weight that is no number ends the run before it can spoil anything.

    training_step    the loss stays on its device, nothing waits for it
    before the step  one look at all losses since the last step, on all ranks: no weight has seen them yet
    before a save    one look at the weights: a gradient may overflow where its loss did not

Under fp16 the scaler meets gradients that overflow and skips their step; only losses are looked at there, too.
"""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lcprune.errors import RunError

ADVICE = "lower the learning rate, set trainer.gradient_clip_val or look at that text, then go on with --ckpt_path last"


@runtime_checkable
class NumberedBlocks(Protocol):
    """A loader that can say which training blocks this rank gets in a batch."""

    def blocks_of(self, batch: int) -> list[int]:
        """Numbers of the blocks in a batch of this epoch."""


class LossWatch:
    """The losses of this rank since the last optimizer step."""

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []
        self._copied: torch.cuda.Event | None = None

    def note(self, loss: Tensor, batch_idx: int) -> None:
        """Keeps a loss, a scalar, until the step; a GPU's is on its way to the CPU from now on."""
        value = loss.detach()
        if value.is_cuda:
            value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._losses.append((batch_idx, value))

    def check(self, trainer: Trainer) -> None:
        """Before the optimizer steps; every rank has to ask.

        Raises:
            RunError: A loss is NaN or infinite; the message names its batch where it was this rank's.
        """
        if self._copied is not None:
            self._copied.synchronize()  # waits for the last loss alone, not for the gradients that follow it
        losses, self._losses, self._copied = self._losses, [], None
        finite = not losses or bool(torch.isfinite(torch.stack([loss for _, loss in losses])).all())
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        step = f"optimizer step {trainer.global_step + 1}"
        bad = next(((batch, value.item()) for batch, value in losses if not torch.isfinite(value)), None)
        if bad is None:
            raise RunError(f"{step}: the loss of another rank is not finite, see its message; {ADVICE}.")
        raise RunError(
            f"{step}: the loss is {bad[1]} in batch {bad[0]} of epoch {trainer.current_epoch}"
            f"{_blocks(trainer, bad[0])}; no weight has seen it and the last checkpoint is good: {ADVICE}."
        )


def check_weights(parameters: Iterable[tuple[str, nn.Parameter]], trainer: Trainer) -> None:
    """Before a checkpoint is written; every rank has to ask.

    Args:
        parameters: By name; sharded ones are looked at as far as they are here.
        trainer: Of the run.

    Raises:
        RunError: One of them holds NaN or infinity, here or on another rank.
    """
    bad = next((name for name, parameter in parameters if not _is_finite(parameter)), None)
    if trainer.strategy.reduce_boolean_decision(bad is None, all=True):
        return
    raise RunError(
        f"after optimizer step {trainer.global_step} {bad or 'a weight of another rank'} is not finite: its gradient "
        f"overflowed; nothing was saved and the last checkpoint is good: {ADVICE}."
    )


def _is_finite(parameter: nn.Parameter) -> bool:
    values = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return not values.is_floating_point() or bool(torch.isfinite(values).all())


def _blocks(trainer: Trainer, batch: int) -> str:
    loader = trainer.train_dataloader
    if not isinstance(loader, NumberedBlocks):
        return ""
    return f" (training blocks {', '.join(map(str, loader.blocks_of(batch)))})"
