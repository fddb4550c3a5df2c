"""How fast a run is: tokens per second, and the share of the device's peak that the models' own arithmetic takes.

    tokens per second     tokens read, prompts among them, padding not, over all ranks
    scored per second     of these, positions whose next token counts
    MFU                   arithmetic / (seconds * peak * ranks)
    arithmetic            2 per token and entry of a weight matrix: once forward, and where a gradient comes back once
                          more for the state and, if it is trained, once more for the weight

over every layer that teacher or student runs, and over the heads at scored positions. What runs is seen at the first
batch of every window, not derived: a shared prefix, merged layers that learn alone, or a pass that ends early count as
what they are. Left out are attention's products of queries, keys and values (PaLM, arXiv:2204.02311, appendix B, has
them), whatever is computed a second time (`activations: recompute`) and padding. Of experts all count, whether or not
a token is sent there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lcprune.distillation.levels import Labels, Logits, only
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.objectives import scored_positions
from lcprune.distillation.phases import Phase
from lcprune.distillation.standing import tokens_of
from lcprune.errors import InputError
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch


class Throughput(Callback):
    """Logs `train/tokens_per_second`, `train/scored_per_second` and, where the peak is known, `train/mfu`.

    Reading data counts; validation does not, nor does a window in which layers merge, nor a fit's first batch, which
    warms up. Nothing is kept with a checkpoint: a resumed run begins a new window.

    Args:
        window: Optimizer steps that a figure is taken over.
    """

    def __init__(self, window: int = 10) -> None:
        if window < 1:
            raise InputError(f"Throughput: window={window} must be 1 or more.")
        self.window = window
        self._open: _Window | None = None
        self._paused = 0.0
        self._peak: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks up the device's peak."""
        if not isinstance(pl_module, DistillationModule):
            raise InputError(f"Throughput measures a DistillationModule, not a {type(pl_module).__name__}.")
        self._open = None
        device = trainer.strategy.root_device
        self._peak = get_available_flops(device, _multiplied_in(trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Watches the first batch of a window."""
        if self._peak and self._open is not None and self._open.passes is None:
            assert isinstance(pl_module, DistillationModule)
            self._open.passes = _Passes(pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """All that runs forward has run."""
        if self._open is not None and self._open.passes is not None:
            self._open.passes.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Counts a batch, and logs at the end of a window."""
        assert isinstance(pl_module, DistillationModule)
        step, depth, phase = trainer.global_step, pl_module.history.depth, pl_module.now.phase
        window = self._open
        if window is not None and window.depth == depth:
            window.count(batch)
            if step - window.step < self.window and window.phase is phase:
                return
            self._log(trainer, window)
        self._open = _Window(depth, phase, step, _now(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._paused = _now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets it go on."""
        if self._open is not None:
            self._open.began += _now(trainer) - self._paused

    def _log(self, trainer: Trainer, window: "_Window") -> None:
        seconds = _now(trainer) - window.began
        tokens, scored = (_over_ranks(trainer, count) for count in (window.tokens, window.scored))
        figures = {"train/tokens_per_second": tokens / seconds, "train/scored_per_second": scored / seconds}
        if self._peak and window.passes is not None:
            flops = window.passes.per_token * tokens + window.passes.per_scored * scored
            figures["train/mfu"] = flops / (seconds * self._peak * trainer.world_size)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)


class _Passes:
    """The arithmetic per token of what teacher and student run forward, from its making until it is closed."""

    def __init__(self, module: DistillationModule) -> None:
        assert module.teacher is not None
        self.per_token, self.per_scored = 0.0, 0.0
        self._module, self._levels, self._handles = module, module.now.phase.objective, list[RemovableHandle]()
        for model in (module.student, module.teacher.model):
            for layer in layout_of(model.config).layers_of(model):
                self._handles.append(layer.register_forward_hook(self._see))

    def _see(self, layer: nn.Module, args: object, output: object) -> None:
        state = output[0] if isinstance(output, tuple) else output
        assert isinstance(state, Tensor)
        self.per_token += _flops(layer, learns=state.requires_grad)

    def close(self) -> None:
        """Stops looking, and takes the heads down; later calls change nothing."""
        while self._handles:
            self._handles.pop().remove()
        assert self._module.teacher is not None
        teacher, student = (
            model.get_output_embeddings() for model in (self._module.teacher.model, self._module.student)
        )
        logits, labels = only(self._levels, Logits), only(self._levels, Labels)
        # A teacher that is looked up in a cache multiplies nothing.
        runs = logits is not None and self._module.cache is None
        self.per_scored = _flops(teacher, learns=False) if runs else 0.0
        self.per_scored += _flops(student, learns=True) if logits is not None or labels is not None else 0.0


@dataclass
class _Window:
    """What has been counted since it was opened."""

    depth: int
    phase: Phase
    step: int
    began: float
    tokens: int | Tensor = 0
    scored: int | Tensor = 0
    passes: _Passes | None = None

    def count(self, batch: Batch) -> None:
        """Adds a batch, without waiting for the device."""
        self.tokens = self.tokens + tokens_of(batch)
        self.scored = self.scored + scored_positions(batch).sum()


def _flops(module: nn.Module, *, learns: bool) -> float:
    """Per token: forward, and where a gradient comes back, that of every state and of the weights that are trained."""
    matrices = list(_matrices(module))
    forward = sum(entries for entries, _ in matrices)
    trained = sum(entries for entries, is_trained in matrices if is_trained)
    return 2.0 * (forward + (forward + trained if learns else 0))


def _matrices(module: nn.Module) -> Iterator[tuple[int, bool]]:
    """Of every matrix: its entries, and whether it is trained; one that is packed (4 bit) counts unpacked."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if isinstance(part, nn.Linear) and parameter is part.weight:
                yield part.in_features * part.out_features, parameter.requires_grad
            elif parameter.dim() > 1:
                yield parameter.numel(), parameter.requires_grad


def _over_ranks(trainer: Trainer, count: int | Tensor) -> float:
    total = torch.as_tensor(float(count), device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(total, reduce_op="sum"))


def _now(trainer: Trainer) -> float:
    """The clock, once the device has done what it was told."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _multiplied_in(trainer: Trainer, module: DistillationModule) -> torch.dtype:
    """The type that the student multiplies in; the teacher's may be another."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else next(module.student.parameters()).dtype
