"""What a strategy has to be told when a model changes under it."""

from lightning.pytorch.strategies import DDPStrategy, Strategy


def parameters_changed(strategy: Strategy) -> None:
    """Other Parameters are trained than before, or there are fewer: DDP's reducer is made anew around the module."""
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
