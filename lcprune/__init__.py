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


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:  # every public name, so that a misspelt one is an error
    from lcprune.api import distill as distill
    from lcprune.api import load_history as load_history
    from lcprune.api import perplexity as perplexity
    from lcprune.api import score as score
    from lcprune.data.module import TextDataModule as TextDataModule
    from lcprune.delivery.export import export as export
    from lcprune.distillation.adapters import Lora as Lora
    from lcprune.distillation.callbacks import ProgressiveCollapse as ProgressiveCollapse
    from lcprune.distillation.levels import Boundary as Boundary
    from lcprune.distillation.levels import Labels as Labels
    from lcprune.distillation.levels import Level as Level
    from lcprune.distillation.levels import Local as Local
    from lcprune.distillation.levels import Logits as Logits
    from lcprune.distillation.module import DistillationModule as DistillationModule
    from lcprune.distillation.optim import RewarmingCosine as RewarmingCosine
    from lcprune.distillation.optim import RewarmingWSD as RewarmingWSD
    from lcprune.distillation.phases import Phase as Phase
    from lcprune.distillation.schedules import AtSteps as AtSteps
    from lcprune.distillation.schedules import Evenly as Evenly
    from lcprune.distillation.schedules import EveryNSteps as EveryNSteps
    from lcprune.distillation.schedules import Schedule as Schedule
    from lcprune.distillation.signals import SaveOnSignal as SaveOnSignal
    from lcprune.distillation.stages import Stage as Stage
    from lcprune.distillation.storing import AtomicCheckpointIO as AtomicCheckpointIO
    from lcprune.distillation.throughput import Throughput as Throughput
    from lcprune.distillation.triggers import ByTokens as ByTokens
    from lcprune.distillation.triggers import WhenRecovered as WhenRecovered
    from lcprune.errors import InputError as InputError
    from lcprune.merging.architectures import LayerLayout as LayerLayout
    from lcprune.merging.calibration import Calibration as Calibration
    from lcprune.merging.calibration import LayerStats as LayerStats
    from lcprune.merging.collapse import collapse as collapse
    from lcprune.merging.collapse import execute as execute
    from lcprune.merging.collapse import plan as plan
    from lcprune.merging.concat import Concat as Concat
    from lcprune.merging.criteria import AngularDistance as AngularDistance
    from lcprune.merging.criteria import BlockInfluence as BlockInfluence
    from lcprune.merging.criteria import Criterion as Criterion
    from lcprune.merging.criteria import OutputSimilarity as OutputSimilarity
    from lcprune.merging.criteria import TrialPerplexity as TrialPerplexity
    from lcprune.merging.gradients import Magnitude as Magnitude
    from lcprune.merging.gradients import Taylor as Taylor
    from lcprune.merging.greedy import GreedyPlanner as GreedyPlanner
    from lcprune.merging.lineage import MergeHistory as MergeHistory
    from lcprune.merging.lineage import MergeStep as MergeStep
    from lcprune.merging.operators import Drop as Drop
    from lcprune.merging.operators import Operator as Operator
    from lcprune.merging.operators import Rdsc as Rdsc
    from lcprune.merging.operators import ReplaceWithLast as ReplaceWithLast
    from lcprune.merging.operators import WeightedAverage as WeightedAverage
    from lcprune.merging.planners import ContiguousBlock as ContiguousBlock
    from lcprune.merging.planners import FixedPlan as FixedPlan
    from lcprune.merging.planners import OneShotRanking as OneShotRanking
    from lcprune.merging.planners import Planner as Planner
    from lcprune.merging.planners import ThresholdPlanner as ThresholdPlanner
    from lcprune.merging.progressive import ProgressivePlanner as ProgressivePlanner
    from lcprune.merging.refit import MagnitudeCompensation as MagnitudeCompensation
    from lcprune.merging.refit import Refit as Refit
    from lcprune.merging.refit import RidgeRefit as RidgeRefit
    from lcprune.merging.search import RefitSearch as RefitSearch
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'lcprune' has no attribute {name!r}; it has {', '.join(__all__)}")
        return getattr(importlib.import_module(_HOME[name]), name)
