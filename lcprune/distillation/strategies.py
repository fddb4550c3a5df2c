"""Lightning's trainer where it has to be told something, or asked otherwise than usual."""

from math import ceil

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

from lcprune.errors import InputError

OTHERS = {"DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}
"""Descendants of the strategies that layers can be merged under, which they cannot; by name: some are not installed."""


def is_ddp(strategy: Strategy) -> bool:
    """Whether it is plain DDP, a wrapper whose reducer waits for the gradients of the module's own Parameters."""
    return isinstance(strategy, DDPStrategy) and not _is_other(strategy)


def is_sharding(strategy: Strategy) -> bool:
    """Whether it is Lightning's for FSDP2, under which the module shards its models itself."""
    return isinstance(strategy, ModelParallelStrategy)


def is_tensor_parallel(strategy: Strategy) -> bool:
    """Whether layers would be cut along their heads too, as `auto` does within a machine."""
    return isinstance(strategy, ModelParallelStrategy) and strategy._tensor_parallel_size != 1


def check_launcher(strategy: Strategy) -> None:
    """Raises InputError for a strategy whose ranks are other processes than the one that asks for the student."""
    if isinstance(launcher := strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            f"trainer.strategy={type(strategy).__name__} by {launcher._start_method} (ddp_spawn, ddp_fork, "
            "ddp_notebook) runs in processes that take the student with them when they end: use strategy ddp."
        )


def check_merges(strategy: Strategy) -> None:
    """Raises InputError for a strategy under which layers cannot merge while they are trained.

    What FSDP1 and DeepSpeed train are slices of one long vector per wrapper, tensor parallel layers are cut along
    their heads, and XLA has compiled the old depth.
    """
    in_shards = is_sharding(strategy) and not is_tensor_parallel(strategy)
    alone = isinstance(strategy, SingleDeviceStrategy) and not _is_other(strategy)
    if in_shards or alone or is_ddp(strategy):
        return
    raise InputError(
        f"trainer.strategy={type(strategy).__name__}{_size(strategy)} cannot merge layers during training: use one "
        "device, ddp or ModelParallelStrategy with tensor_parallel_size: 1 (recipes/fsdp.yaml), or set "
        "collapse.schedule: null and merge between two runs with `lcprune collapse-checkpoint IN OUT`."
    )


def _size(strategy: Strategy) -> str:
    return f" with tensor_parallel_size={strategy._tensor_parallel_size}" if is_tensor_parallel(strategy) else ""  # type: ignore[attr-defined]


def _is_other(strategy: Strategy) -> bool:
    return not OTHERS.isdisjoint(base.__name__ for base in type(strategy).__mro__)


def parameters_changed(strategy: Strategy) -> None:
    """Other Parameters are trained than before, or there are fewer: DDP's reducer is made anew around the module."""
    if is_ddp(strategy):
        assert isinstance(strategy, DDPStrategy)
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


def is_over(trainer: Trainer) -> bool:
    """Whether the run has no optimizer step ahead; a trial of the code (fast_dev_run) goes through everything."""
    return not trainer.fast_dev_run and trainer.global_step >= optimizer_steps(trainer)  # type: ignore[attr-defined]


def validation_follows(trainer: Trainer) -> bool:
    """Whether the trainer validates after the batch that has just been trained on.

    It does so behind the checkpoint of that batch, and a run that resumes there does not make up for it.
    """
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None, "asked outside of training"
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def clip_gradients(module: LightningModule, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
    """As Lightning does; for fused optimizers too, which it refuses in mixed precision."""
    plugin = module.trainer.precision_plugin
    if not value or not isinstance(plugin, MixedPrecision):
        module.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm)
        return
    if plugin.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        plugin.scaler.unscale_(optimizer)  # or the optimizer would, behind the clipping; all others are unscaled by now
    Precision.clip_gradients(plugin, optimizer, value, GradClipAlgorithmType(algorithm or "norm"))
