"""Lightning's trainer where it has to be told something, or asked otherwise than usual."""

from math import ceil

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer


def parameters_changed(strategy: Strategy) -> None:
    """Other Parameters are trained than before, or there are fewer: DDP's reducer is made anew around the module."""
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


def optimizer_steps(trainer: Trainer) -> float:
    """How many optimizer steps the whole run has; infinite where nobody has said.

    `estimated_stepping_batches` knows the accumulation of the first epoch only.
    """
    estimate = trainer.estimated_stepping_batches
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    schedule = next((each for each in callbacks if isinstance(each, GradientAccumulationScheduler)), None)
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if schedule is None or epochs is None or epochs < 0 or batches == float("inf"):
        return estimate
    steps = sum(ceil(batches / schedule.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)


def validation_follows(trainer: Trainer) -> bool:
    """Whether the trainer validates after the batch that has just been trained on.

    It does so behind the checkpoint of that batch, and a run that resumes there does not make up for it.
    """
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None, "asked outside of training"
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def clip_gradients(module: LightningModule, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
    """As Lightning does; for fused optimizers too, which it refuses in mixed precision even where nothing is scaled."""
    plugin = module.trainer.precision_plugin
    if value and isinstance(plugin, MixedPrecision) and plugin.scaler is None:
        Precision.clip_gradients(plugin, optimizer, value, GradClipAlgorithmType(algorithm or "norm"))
    else:
        module.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm)
