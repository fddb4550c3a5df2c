"""What a run is going to do, from its settings and the model's config alone: nothing is loaded, no text is read.

    stages     from every optimizer step at which the depth changes: parameters, what trains, memory, work
    phases     which objective is on from which step to which

Which layers merge is the planner's to say, while training; where memory depends on it, the most that it can be is
counted and the stage says so.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from lcprune.distillation import averaging
from lcprune.distillation.callbacks import ProgressiveCollapse
from lcprune.distillation.footprint import (
    At,
    Memory,
    Step,
    memory,
    model_of_depth,
    operations,
    state_bytes,
    trained_elements,
    whole,
)
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.pair import TRUE, storages
from lcprune.distillation.phases import Phase
from lcprune.distillation.strategies import is_sharding
from lcprune.distillation.tracing import Shape, cost_of_layer
from lcprune.distillation.trained import Trained, trains_adapters
from lcprune.distillation.triggers import ByTokens
from lcprune.merging.lineage import Lineage

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What products are computed in under the trainer's precision."""


@dataclass(frozen=True)
class Stretch:
    """Optimizer steps with one objective."""

    first: int
    """The first of them."""
    end: int | None
    """The step behind the last; None = nobody has said."""
    objective: tuple[str, ...]
    """Names of the levels."""
    train: Trained
    """Which Parameters are trained."""


@dataclass(frozen=True)
class Stage:
    """Optimizer steps with one depth."""

    step: int
    """The first of them; where the run begins with a merge, that one is behind us."""
    depth: int
    """Layers of the student."""
    parameters: int
    """Of the student; a tied head counts once."""
    trained: int
    """Numbers that are trained, in the phase with most of them."""
    at_most: bool
    """Whether fewer are trained, and less memory taken, once it is known which layers merge."""
    memory: Memory
    """Of the phase that takes most."""
    flops: int
    """Floating-point operations of an optimizer step on all devices, in the phase with most."""


@dataclass(frozen=True)
class Forecast:
    """A whole run."""

    teacher: str
    """Name of the original."""
    layers: int
    """Number of the original's layers."""
    parameters: int
    """Number of the original's parameters."""
    steps: int | None
    """Optimizer steps at most; None = the number of epochs and the text decide."""
    tokens_per_step: int
    """On all devices, accumulated batches included."""
    stages: tuple[Stage, ...]
    """Stretches of the run with one depth, in order."""
    phases: tuple[Stretch, ...]
    """Stretches of the run with one objective, in order."""
    otherwise: dict[str, int]
    """Peak memory in bytes with one setting changed."""
    whole: int
    """Bytes more for as long as layers of a packed or sharded student merge; 0 where it is neither, or none merge."""
    too_late: tuple[int, ...]
    """Depths that the run ends too early for."""

    @property
    def tokens(self) -> int | None:
        """Of the whole run, at most."""
        return None if self.steps is None else self.steps * self.tokens_per_step

    @property
    def peak(self) -> Memory:
        """The stage that takes most memory."""
        return max((stage.memory for stage in self.stages), key=lambda memory: memory.total)

    @property
    def flops(self) -> int | None:
        """Of the whole run's training steps."""
        if self.steps is None:
            return None
        ends = [stage.step for stage in self.stages[1:]] + [self.steps]
        return sum(stage.flops * (end - stage.step) for stage, end in zip(self.stages, ends, strict=True))

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        totals = {"tokens": self.tokens, "flops": self.flops, "peak_memory": self.peak.total}
        return asdict(self) | totals


@dataclass(frozen=True)
class Batches:
    """What a data module gives each device."""

    rows: int
    """Blocks in a batch."""
    length: int
    """Tokens in a block."""


def forecast(module: DistillationModule, callback: ProgressiveCollapse, trainer: Trainer, batches: Batches) -> Forecast:
    """What `trainer.fit` would do.

    Args:
        module: Nothing of it needs to be loaded.
        callback: The merges.
        trainer: The trainer, whose devices are counted.
        batches: What it would be given.

    Raises:
        InputError: As `fit` would, where the settings do not go together.
    """
    callback.check(trainer, module)
    module.check_sharding(trainer)
    if module.lora is not None:
        module.lora.check(module.teacher_config)
    step = _step(module, trainer, batches)
    per_step = trainer.accumulate_grad_batches * trainer.world_size
    steps = trainer.max_steps if trainer.max_steps >= 0 else None
    tokens = batches.rows * batches.length * per_step
    planned = _depths(module, callback, tokens)
    depths = [(first, depth) for first, depth in planned if steps is None or first < max(steps, 1)]
    lineages = _lineages(module, callback, len(planned))[: len(depths)]
    stages = tuple(
        _stage(first, depth, lineage, module, step, per_step)
        for (first, depth), lineage in zip(depths, lineages, strict=True)
    )
    others = {
        "with activations: keep" if step.recompute else "with activations: recompute": replace(
            step, recompute=not step.recompute
        ),
        "without teacher_cache" if step.cached else "with teacher_cache": replace(step, cached=not step.cached),
    }
    points = [
        At(depth, phase.objective, phase.trained(module.train_usually), lineage)
        for (_, depth), lineage in zip(depths, lineages, strict=True)
        for phase in module.phases
    ]
    teacher = model_of_depth(module.teacher_config, module.history.teacher_depth)
    merges = depths[-1][1] < module.begun.depth
    return Forecast(
        teacher=module.teacher_name,
        layers=module.history.teacher_depth,
        parameters=sum(parameter.numel() for parameter in teacher.parameters()),
        steps=steps,
        tokens_per_step=tokens,
        stages=stages,
        phases=tuple(_stretches(module, [first for first, _ in depths[1:]], steps)),
        whole=whole(step, module.begun.depth) if merges else 0,
        too_late=tuple(depth for _, depth in planned[len(depths) :]),
        otherwise={name: max(memory(other, at).total for at in points) for name, other in others.items()},
    )


def _step(module: DistillationModule, trainer: Trainer, batches: Batches) -> Step:
    precision = str(trainer.precision)
    student, teacher = storages(module.weights_dtype, module.teacher_dtype, module.lora, precision)
    weights = getattr(torch, TRUE.get(precision, module.weights_dtype))
    shape = Shape(batches.rows, batches.length, weights, AUTOCAST.get(precision))
    adapters = any(trains_adapters(phase.trained(module.train_usually)) for phase in module.phases)
    trained = torch.float32 if adapters and precision not in TRUE else weights
    buckets, accumulates = isinstance(trainer.strategy, DDPStrategy), trainer.accumulate_grad_batches > 1
    return Step(
        config=module.teacher_config,
        shape=shape,
        layer=cost_of_layer(module.teacher_config, shape, module.lora),
        student=student,
        teacher=teacher,
        trained_dtype=weights,
        optimizer=state_bytes(module.make_optimizer, trained),
        lora=module.lora,
        recompute=module.activations == "recompute",
        cached=module.teacher_cache is not None,
        gradients_made=1 + buckets,
        gradients_kept=buckets + accumulates,
        parts=trainer.world_size if is_sharding(trainer.strategy) else 1,
        averages=averaging.count(trainer),
        cast=TRUE.get(precision),
    )


def _depths(module: DistillationModule, callback: ProgressiveCollapse, tokens: int) -> list[tuple[int, int]]:
    """From which step on how many layers, at the latest; a merge at step 0 comes before any training.

    Args:
        module: With the depth that the run begins with.
        callback: The merges.
        tokens: Of an optimizer step.
    """
    depth = module.begun.depth
    milestones = [] if callback.schedule is None else list(callback.schedule.milestones(depth))
    if isinstance(callback.schedule, ByTokens):
        milestones = [(ceil(when / tokens), target) for when, target in milestones]
    return milestones if milestones and milestones[0][0] == 0 else [(0, depth), *milestones]


def _lineages(module: DistillationModule, callback: ProgressiveCollapse, number: int) -> Sequence[Lineage | None]:
    """Of every stage, as far as it is known beforehand."""
    foreseen = callback.foresee(module)
    if foreseen is not None and len(foreseen) == number:
        return foreseen
    # Only the student that the run begins with is known.
    begins = callback.schedule is None or callback.schedule.deadlines(module.begun.depth)[0][0] > 0
    return [module.begun.lineage if begins and index == 0 else None for index in range(number)]


def _stage(
    first: int, depth: int, lineage: Lineage | None, module: DistillationModule, step: Step, per_step: int
) -> Stage:
    points = [At(depth, phase.objective, phase.trained(module.train_usually), lineage) for phase in module.phases]
    student = model_of_depth(module.teacher_config, depth)
    return Stage(
        step=first,
        depth=depth,
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        trained=max(trained_elements(student, at, module.lora) for at in points),
        at_most=any(at.at_most for at in points),
        memory=max((memory(step, at) for at in points), key=lambda each: each.total),
        flops=per_step * max(operations(step, at) for at in points),
    )


def _stretches(module: DistillationModule, merges: Sequence[int], end: int | None) -> list[Stretch]:
    """The phases one after the other, counted anew from every merge if the module says so."""
    begins = [0, *merges] if module.phases_begin == "merge" else [0]
    found: list[Stretch] = []
    for first, last in zip(begins, [*begins[1:], end], strict=True):
        step: int | None = first
        for phase in module.phases:
            if step is None or (last is not None and step >= last):
                break
            behind = _behind(step, phase, last)
            found.append(_stretch(module, phase, step, behind))
            step = behind
    return _joined(found)


def _behind(step: int, phase: Phase, last: int | None) -> int | None:
    if phase.steps is None:
        return last
    return step + phase.steps if last is None else min(step + phase.steps, last)


def _stretch(module: DistillationModule, phase: Phase, first: int, end: int | None) -> Stretch:
    names = tuple(type(level).__name__ for level in phase.objective)
    return Stretch(first, end, names, phase.trained(module.train_usually))


def _joined(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Without the seams where one phase goes on over a merge."""
    found: list[Stretch] = []
    for each in stretches:
        if found and (found[-1].objective, found[-1].train) == (each.objective, each.train):
            found[-1] = replace(found[-1], end=each.end)
        else:
            found.append(each)
    return found
