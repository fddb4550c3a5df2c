"""lcprune: a Hugging Face causal LM 20-50 % shorter, merged while Lightning trains it and taught by the original.

The public names are imported when they are first used, so that `import lcprune` and `lcprune --help` are instant.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "lcprune.errors": ("InputError",),
    "lcprune.merging.lineage": ("MergeHistory", "MergeStep"),
    "lcprune.merging.architectures": ("LayerLayout",),
    "lcprune.merging.calibration": ("Calibration", "LayerStats"),
    "lcprune.merging.operators": ("Drop", "Operator", "Rdsc", "ReplaceWithLast", "WeightedAverage"),
    "lcprune.merging.concat": ("Concat",),
    "lcprune.merging.criteria": (
        "AngularDistance",
        "BlockInfluence",
        "Criterion",
        "OutputSimilarity",
        "TrialPerplexity",
    ),
    "lcprune.merging.gradients": ("Magnitude", "Taylor"),
    "lcprune.merging.planners": ("ContiguousBlock", "FixedPlan", "OneShotRanking", "Planner", "ThresholdPlanner"),
    "lcprune.merging.progressive": ("ProgressivePlanner",),
    "lcprune.merging.greedy": ("GreedyPlanner",),
    "lcprune.merging.refit": ("MagnitudeCompensation", "Refit", "RidgeRefit"),
    "lcprune.merging.search": ("RefitSearch",),
    "lcprune.merging.collapse": ("collapse", "execute", "plan"),
    "lcprune.distillation.schedules": ("AtSteps", "Evenly", "EveryNSteps", "Schedule"),
    "lcprune.distillation.triggers": ("ByTokens", "WhenRecovered"),
    "lcprune.distillation.stages": ("Stage",),
    "lcprune.distillation.levels": ("Boundary", "Labels", "Level", "Local", "Logits"),
    "lcprune.distillation.adapters": ("Lora",),
    "lcprune.distillation.phases": ("Phase",),
    "lcprune.distillation.optim": ("RewarmingCosine", "RewarmingWSD"),
    "lcprune.distillation.storing": ("AtomicCheckpointIO",),
    "lcprune.distillation.signals": ("SaveOnSignal",),
    "lcprune.distillation.module": ("DistillationModule",),
    "lcprune.distillation.throughput": ("Throughput",),
    "lcprune.distillation.callbacks": ("ProgressiveCollapse",),
    "lcprune.data.module": ("TextDataModule",),
    "lcprune.delivery.export": ("export",),
    "lcprune.api": ("distill", "load_history", "perplexity", "score"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lcprune' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from lcprune.api import distill as distill
    from lcprune.api import load_history as load_history
    from lcprune.api import perplexity as perplexity
    from lcprune.api import score as score
    from lcprune.data.module import TextDataModule as TextDataModule
    from lcprune.delivery.export import export as export
    from lcprune.distillation.callbacks import ProgressiveCollapse as ProgressiveCollapse
    from lcprune.distillation.module import DistillationModule as DistillationModule
    from lcprune.merging.collapse import collapse as collapse
    from lcprune.merging.lineage import MergeHistory as MergeHistory
