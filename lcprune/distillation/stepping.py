"""What surrounds an optimizer step: which gradient it takes, and that it is not kept."""

from lightning.pytorch import LightningModule
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lcprune.distillation.accumulation import TokenWindow
from lcprune.distillation.boundary import StepBoundary
from lcprune.distillation.faults import LossWatch
from lcprune.distillation.strategies import clip_gradients


class Stepping(LightningModule):
    """A module with a student, whose gradient is that of the mean over all tokens since the last step."""

    student: PreTrainedModel
    """What is trained."""
    boundary: StepBoundary
    """Where the run stands between two optimizer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.window = TokenWindow()
        """The tokens since the last step."""
        self.losses = LossWatch()
        """Their losses."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Makes the gradient that of the mean over all tokens since the last step, on all ranks, however split.

        Raises:
            RunError: One of the losses since the last step is not finite.
        """
        if self._trainer is not None:
            self.losses.check(self.trainer)
        micro_batches = 1 if self._trainer is None else self.trainer.accumulate_grad_batches
        self.window.close(micro_batches, [p for p in self.student.parameters() if p.grad is not None])
        self.boundary.before_update()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As in Lightning, but for fused optimizers in mixed precision too."""
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)


def let_gradients_go(optimizer: Optimizer) -> None:
    """Frees gradients with the step that takes them; Lightning keeps them until the next backward pass.

    A forward pass holds the most activations where it ends: now without a copy of all weights beside them.
    """
    optimizer.register_step_post_hook(lambda stepped, *_: stepped.zero_grad())
