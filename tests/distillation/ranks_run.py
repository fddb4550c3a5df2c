"""One of several processes of a run, and what it has in the end: `ranks_run.py FOLDER TEACHER TEXT SCENARIO STRATEGY`.

STRATEGY is one (a single process with the global batch), ddp, fsdp (fsdp-distributed with checkpoints in shards), or
fsdp-one, which shards among one process alone. Writes `rank0.json` and so on.
"""

import gc
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor

from lcprune import AtSteps, FixedPlan, Logits, OneShotRanking, ProgressiveCollapse, RidgeRefit
from lcprune.distillation.adapters import Lora
from lcprune.distillation.levels import Boundary, Local
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.phases import Phase
from lcprune.merging.concat import Concat
from lcprune.merging.operators import Rdsc, WeightedAverage
from tests.distillation import runs

THREE = {2: 5, 5: 4, 8: 3}
"""Optimizer steps of three merges, and the depths that they lead to."""
MILD = partial(torch.optim.AdamW, lr=1e-3)


@dataclass(frozen=True)
class Scenario:
    """A run: what merges when, and what is trained."""

    collapse: Callable[[], ProgressiveCollapse]
    module: dict[str, object]
    stop: tuple[int, str] | None = None
    """Where the run is interrupted for the first time, to be resumed at once."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """The trainer's."""


SCENARIOS = {
    "curve": Scenario(
        lambda: ProgressiveCollapse(AtSteps(THREE), planner=OneShotRanking(), operator=Rdsc()), {"optimizer": MILD}
    ),
    "refit": Scenario(
        lambda: ProgressiveCollapse(AtSteps({2: 5, 5: 4}), operator=Concat(), refit=RidgeRefit(strengths=[0.1, 1.0])),
        {"optimizer": MILD, "train": "layers"},
    ),
    "phases": Scenario(
        lambda: ProgressiveCollapse(AtSteps({0: 5, 5: 4}), operator=WeightedAverage()),
        {
            "optimizer": MILD,
            "objective": None,
            "phases": [Phase([Logits(), Boundary()], steps=2, train="merged"), Phase([Logits()], train="all")],
        },
    ),
    "adapters": Scenario(
        lambda: ProgressiveCollapse(AtSteps({2: 5, 5: 4}), operator=WeightedAverage()),
        {"optimizer": MILD, "train": "lora", "lora": Lora(rank=2)},
    ),
    "resume": Scenario(
        lambda: ProgressiveCollapse(AtSteps({3: 5, 7: 4}), planner=FixedPlan([[1, 2], [3, 4]])),
        {"optimizer": MILD},
        (5, "before"),
    ),
    "resume at": Scenario(
        lambda: ProgressiveCollapse(AtSteps({3: 5, 7: 4}), planner=FixedPlan([[1, 2], [3, 4]])),
        {"optimizer": MILD},
        (3, "at"),
    ),
}
SCENARIOS["mixed"] = replace(
    SCENARIOS["curve"], module={"optimizer": MILD, "activations": "recompute"}, precision="bf16-mixed"
)
SCENARIOS["whole"] = replace(SCENARIOS["resume"], stop=None)
SCENARIOS["local"] = Scenario(
    SCENARIOS["phases"].collapse,
    {"optimizer": MILD, "objective": None, "phases": [Phase([Local()], steps=2), Phase([Logits()], train="all")]},
)


class Watch(Callback):
    """What is alive in this process: layers that were there, and bytes of all tensors before every step."""

    def __init__(self) -> None:
        self.layers: list[weakref.ref[torch.nn.Module]] = []
        self.bytes: dict[int, int] = {}
        self.trained: dict[int, int] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: DistillationModule, *_: object) -> None:
        layers = list(pl_module.student.model.layers)
        known = [layer() for layer in self.layers]
        self.layers += [weakref.ref(layer) for layer in layers if not any(layer is other for other in known)]
        self.bytes[trainer.global_step] = alive()
        self.trained[trainer.global_step] = sum(p.requires_grad for p in pl_module.student.parameters())


def alive() -> int:
    """Bytes of all tensors of this process, every storage once; of a sharded one what lies here."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and type(thing).__name__ != "DTensor":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Stopped(Exception):
    """The interruption."""


def stop() -> None:
    raise Stopped


def strategy_of(name: str) -> Strategy | str:
    if name.startswith("fsdp"):
        return ModelParallelStrategy(
            data_parallel_size=1 if "one" in name else 2,
            tensor_parallel_size=1,
            save_distributed_checkpoint="distributed" in name,
        )
    return "ddp" if name == "ddp" else "auto"


def train(
    folder: Path, teacher: Path, text: Path, name: str, strategy: str, *others: Callback, resume: bool = False
) -> tuple[Trainer, DistillationModule, runs.Losses, Watch]:
    scenario = SCENARIOS[name]
    torch.manual_seed(0)
    module, losses, watch = runs.student_of(teacher, **scenario.module), runs.Losses(), Watch()
    alone = "one" in strategy
    trainer = runs.trainer_for(
        folder,
        losses,
        watch,
        *others,
        scenario.collapse(),
        runs.checkpoints_in(folder),
        strategy=strategy_of(strategy),
        devices=1 if alone else 2,
        max_steps=10,
        gradient_clip_val=1.0,
        precision=scenario.precision,
    )
    data = runs.data_for(teacher, text, batch_size=4 if alone else 2)
    if resume:
        trainer.ckpt_path = str(folder / "last.ckpt")  # a sharded strategy has to know it before it loads
    trainer.fit(module, datamodule=data)
    return trainer, module, losses, watch


def main(folder: Path, teacher: Path, text: Path, name: str, strategy: str) -> None:
    """Trains, then says what came of it."""
    point, seen = SCENARIOS[name].stop, {}
    if point is not None:
        losses = runs.Losses()
        try:
            train(folder, teacher, text, name, strategy, losses, runs.Interrupt(*point, stop))
        except Stopped:
            seen = losses.seen
    trainer, module, losses, watch = train(folder, teacher, text, name, strategy, resume=bool(seen))
    layers = list(module.student.model.layers)
    gc.collect()
    old = [layer for layer in (each() for each in watch.layers) if layer is not None]
    names, group = {id(p): n for n, p in module.student.named_parameters()}, trainer.optimizers[0].param_groups[0]
    result = {
        "losses": {**seen, **losses.seen},
        "lineage": module.history.lineage,
        "digest": module.history.digest,
        "weights": {n: float(full(p).double().abs().sum()) for n, p in module.student.named_parameters()},
        "exact": [full(p).double().sum().item().hex() for p in module.student.parameters()],
        "dead": sum(not any(layer is other for other in layers) for layer in old),
        "seen_layers": len(watch.layers),
        "bytes": watch.bytes,
        "trained": watch.trained,
        "held": [names.get(id(parameter)) for parameter in group["params"]],
        "states": len(trainer.optimizers[0].state),
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result), encoding="utf-8")


def full(parameter: Tensor) -> Tensor:
    return parameter.detach().full_tensor() if type(parameter.data).__name__ == "DTensor" else parameter.detach()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:6])
