"""The gradient of a mean over tokens, whichever way the tokens are split into micro-batches and ranks.

Lightning averages the gradients of micro-batches, DDP those of ranks; a batch whose answers are short would count as
much as one whose answers are long. Instead every micro-batch is weighed by its tokens while the gradients add up,

    loss_i * n_i / n_1            i = 1 .. A micro-batches, n_i scored tokens of the i-th, n_1 averaged over ranks

and before the optimizer's step the sum is multiplied by A * W * n_1 / sum n_i over all W ranks. Where all batches have
equally many tokens, as packed text has, every factor is 1 and nothing is multiplied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lcprune.merging.double import device_of_doubles


class TokenWindow:
    """The scored tokens since the last optimizer step."""

    def __init__(self) -> None:
        self._tokens = 0
        self._first = 0.0

    def weigh(self, loss: Tensor, tokens: int) -> Tensor:
        """The loss of a micro-batch, a mean, made to count by its tokens.

        Args:
            loss: Scalar.
            tokens: Scored ones, over which it is the mean.
        """
        if not self._first:  # on every rank alike, whatever it scores: the ranks meet in here
            self._first = max(_over_ranks(float(tokens), loss.device) / _ranks(), 1.0)
        self._tokens += tokens
        return loss if tokens == self._first else loss * (tokens / self._first)

    def close(self, micro_batches: int, parameters: Sequence[nn.Parameter]) -> None:
        """Turns the averaged gradients into that of the mean over all tokens; begins the next window.

        Args:
            micro_batches: By how many Lightning has divided, A.
            parameters: Whose gradients.
        """
        if self._first and parameters:
            total = _over_ranks(float(self._tokens), parameters[0].device)
            factor = micro_batches * _ranks() * self._first / max(total, 1.0)
            if factor != 1:
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
        self._tokens, self._first = 0, 0.0


def _ranks() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _over_ranks(value: float, device: torch.device) -> float:
    """The sum over all ranks."""
    if _ranks() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device_of_doubles(device))
    torch.distributed.all_reduce(total)
    return float(total)
