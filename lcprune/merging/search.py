"""RefitSearch: which layers merge, and how, judged by what is left *after* the repair.

    while depth > target:
        teacher, fitting text and held-out text walk through the layers side by side; at every place worth a look
            merge the pair here (trial)  ->  refit its MLP projection on the fitting text  ->  finish the held-out text
        the pair and operator with the least held-out loss merge

A score taken before the refit chooses other layers, and worse ones: what a projection can take over differs from layer
to layer. The layers below a candidate are never run again. The first round looks everywhere; later ones only where the
last looks promised most ("lazy greedy"; gains shrink as the model does), and next to the latest merge.

Greedy search over single layers by loss is SLEB's (arXiv:2402.09025); scoring after a closed-form refit is ours.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import exp
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.activity import Activity, kv_heads_of, recording
from lcprune.merging.calibration import Batch, Calibration, token_loss
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Operator
from lcprune.merging.planners import Planner, new_step, uniform, with_weight_cosines
from lcprune.merging.progress import track
from lcprune.merging.refit import RidgeRefit
from lcprune.merging.regression import held_out_sequences
from lcprune.merging.streams import Stream, regrouped

Look = tuple[int, int]
"""Teacher layer behind which the first member of a pair ends, and which operator."""


@dataclass(frozen=True)
class RefitSearch(Planner):
    """Greedy search over pairs of neighbours and operators by held-out loss after a refit of the merged layer."""

    also: list[Operator] = field(default_factory=list)
    """Operators tried at every place beside the recipe's."""
    candidates: int = 8
    """How many pairs and operators each round after the first tries."""
    fit_sequences: int = 32
    """Calibration sequences that a candidate's projection is fitted on."""
    held_out_sequences: int = 8
    """Other calibration sequences, whose loss decides."""
    strength: float = 0.1
    """lambda of the candidates' ridge regression, in units of the mean of diag(Z Z^T)."""

    nested: ClassVar[bool] = True

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("candidates", "fit_sequences", "held_out_sequences")
            if getattr(self, name) < 1
        ]
        if not self.strength > 0:
            wrong.append(f"strength={self.strength} must be above 0")
        if wrong:
            raise InputError(f"RefitSearch: {'; '.join(wrong)}.")

    def plan(self, calibration: Calibration, operator: Operator, target: int) -> tuple[MergeStep, ...]:
        """One pair per step, the best found; the model is restored bit for bit.

        Raises:
            InputError: If there are fewer than two calibration sequences, or the family's MLPs consist of experts.
        """
        if calibration.layout.mlp is None:
            raise InputError(
                f"RefitSearch refits MLP projections, {calibration.layout.model_type} layers have experts: use "
                "GreedyPlanner or OneShotRanking."
            )
        fitting, held_out = self._split(calibration.batches)
        operators = [operator, *(other for other in self.also if other != operator)]
        for each in operators:
            each.check(calibration.layout)
        teacher = calibration.original if calibration.original is not None else surgery.second_view(calibration.model)
        history = calibration.history if calibration.history is not None else MergeHistory(calibration.depth)
        damage: dict[Look, float] = {}
        steps: list[MergeStep] = []
        with ExitStack() as accepted:
            for _ in track(range(max(0, calibration.depth - target)), "searching merges"):
                search = _Round(self, calibration, teacher, history, operators, fitting, held_out)
                found = search.look(self._worth_a_look(damage, history, len(operators)))
                unmerged = search.loss()
                damage.update({look: candidate.loss - unmerged for look, candidate in found.items()})
                best = min(found.values(), key=lambda candidate: candidate.loss)
                accepted.enter_context(surgery.trial(calibration.model, best.step, measure=best.measure))
                layer = calibration.layout.layers_of(calibration.model)[best.step.base]
                for name, values in best.refitted.items():
                    layer.get_parameter(name).data = values
                history = history.append(best.step)
                steps.append(replace(best.step, scores={"perplexity_after_refit": exp(min(best.loss, 700.0))}))
                del search, found
        return with_weight_cosines(calibration, steps)

    def _worth_a_look(self, damage: dict[Look, float], history: MergeHistory, operators: int) -> set[Look]:
        """Everything in the first round; then the most promising by their last look, and the newest neighbours."""
        ends = [ancestors[-1] for ancestors in history.lineage[:-1]]
        possible = {(end, number) for end in ends for number in range(operators)}
        if not possible <= damage.keys():
            return possible
        ranked = sorted(possible, key=damage.__getitem__)[: self.candidates]
        base = history.steps[-1].base
        beside = {history.lineage[place][-1] for place in (base - 1, base) if 0 <= place < history.depth - 1}
        return {*ranked, *((end, 0) for end in beside)}

    def _split(self, batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
        """Sequences to fit on and sequences to judge by, both spread over the calibration text."""
        single = [
            {name: tensor[row : row + 1] for name, tensor in batch.items()}
            for batch in batches
            for row in range(len(batch["input_ids"]))
        ]
        if len(single) < 2:
            raise InputError(
                "RefitSearch has one calibration sequence and needs some to fit and others to judge by: raise "
                "data.calibration_blocks."
            )
        wanted = min(self.fit_sequences + self.held_out_sequences, len(single))
        single = [single[place * len(single) // wanted] for place in range(wanted)]
        judges = held_out_sequences(wanted, self.held_out_sequences / (self.fit_sequences + self.held_out_sequences))
        return (
            regrouped([each for place, each in enumerate(single) if place not in judges]),
            regrouped([each for place, each in enumerate(single) if place in judges]),
        )


@dataclass(frozen=True)
class _Candidate:
    loss: float
    """Held-out loss in nats per token."""
    step: MergeStep
    activity: Sequence[Activity]
    refitted: dict[str, Tensor]
    """Values of the merged layer's refitted parameters, by their names in the layer."""

    def measure(self, wanted: Sequence[int]) -> Sequence[Activity]:
        """The activity by which the members were judged."""
        return self.activity


class _Round:
    """One walk from front to back over a model as it stands."""

    def __init__(
        self,
        search: RefitSearch,
        calibration: Calibration,
        teacher: PreTrainedModel,
        history: MergeHistory,
        operators: Sequence[Operator],
        fitting: Sequence[Batch],
        held_out: Sequence[Batch],
    ) -> None:
        self._model, self._layout = calibration.model, calibration.layout
        self._operators, self._history, self._held_batches = operators, history, held_out
        self._ridge = RidgeRefit(layers="merged", projections="mlp", strengths=[search.strength])
        self._teacher = Stream(teacher, fitting)
        self._originals = self._layout.layers_of(teacher)
        self._fit = Stream(calibration.model, fitting)
        self._held = Stream(calibration.model, held_out)
        self._needs_activity = any(operator.needs_activity for operator in operators)

    def look(self, looks: set[Look]) -> dict[Look, _Candidate]:
        """Tries the pairs and operators named; afterwards `loss()` is the unmerged model's."""
        found: dict[Look, _Candidate] = {}
        lineage = self._history.lineage
        layers = list(self._layout.layers_of(self._model))
        self._advance_teacher(lineage[0])
        for place in range(len(layers) - 1):
            # The teacher is one group ahead: a pair's target lies behind its second member.
            self._advance_teacher(lineage[place + 1])
            end = lineage[place][-1]
            here = [number for number in range(len(self._operators)) if (end, number) in looks]
            activity = self._activity(layers[place : place + 2]) if here and self._needs_activity else ()
            for number in here:
                found[end, number] = self._try(place, self._operators[number], activity)
            self._fit.advance(layers[place])
            self._held.advance(layers[place])
        return found

    def _advance_teacher(self, ancestors: Sequence[int]) -> None:
        for index in ancestors:
            self._teacher.advance(self._originals[index])

    def _activity(self, pair: Sequence[nn.Module]) -> Sequence[Activity]:
        """What both members do on the fitting text."""
        with recording(pair, self._layout, kv_heads_of(self._model.config)) as recorder:
            for index, mask in enumerate(self._fit.masks):
                recorder.mask_BT = mask
                self._fit.run(pair[1], index, self._fit.run(pair[0], index))
        return recorder.activities()

    def _try(self, place: int, operator: Operator, activity: Sequence[Activity]) -> _Candidate:
        """Merges, refits, judges, restores."""
        assert self._layout.mlp is not None
        step = new_step((place, place + 1), operator, uniform((place, place + 1)))
        with surgery.trial(self._model, step, measure=lambda _: activity):
            layers = list(self._layout.layers_of(self._model))
            self._ridge.refit_mlp(self._fit, self._teacher, layers[place])
            loss = self.loss(*layers[place:])
            consumer = layers[place].get_submodule(self._layout.mlp.consumer)
            refitted = {f"{self._layout.mlp.consumer}.{name}": p.data for name, p in consumer.named_parameters()}
        return _Candidate(loss, step, activity, refitted)

    def loss(self, *layers: nn.Module) -> float:
        """Held-out loss after these layers, from where the held-out text stands; in nats per token."""
        total, count = 0.0, 0
        for state, batch in zip(self._held.last_states(*layers), self._held_batches, strict=True):
            loss, tokens = token_loss(self._model, state, batch)
            total, count = total + loss, count + tokens
        return total / count
