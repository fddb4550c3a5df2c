"""RefitSearch: which layers merge, and how, judged by what is left *after* the repair.

    while depth > target:
        at every place worth a look, with every operator worth a try there:
            merge the pair (trial)  ->  refit its MLP projection on the fitting text  ->  finish the held-out text
        the pair and operator with the least held-out loss merge

A score taken before the refit chooses other layers, and worse ones: what a projection can take over differs from layer
to layer. What keeps the search short:

    places      the first round looks everywhere with the recipe's operator, and with the others where that promised
                most; later rounds look only where the last look promised most ("lazy greedy"; gains shrink as the
                model does), and next to the latest merge
    prefix      the streams before every layer are kept, and after a merge run again only from there on
    halves      a candidate that half of the held-out text finds clearly worse than the best does not see the other;
                the first round begins where the stream turns least, so that a good one is known early

Greedy search over single layers by loss is SLEB's (arXiv:2402.09025); scoring after a closed-form refit is ours.
Memory: states [B, T, D] of the fitting text before every layer, of teacher and student, and of the held-out text; the
refitted weights of the best candidate alone.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import exp, inf, isnan
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.activity import Activity, kv_heads_of, recording
from lcprune.merging.architectures import LayerLayout
from lcprune.merging.calibration import Batch, Calibration, next_tokens, token_loss
from lcprune.merging.lineage import Lineage, MergeHistory, MergeStep
from lcprune.merging.operators import Operator
from lcprune.merging.planners import Planner, new_step, uniform, with_weight_cosines
from lcprune.merging.progress import track
from lcprune.merging.refit import RidgeRefit
from lcprune.merging.regression import held_out_sequences
from lcprune.merging.streams import Stream, one_by_one, regrouped

Look = tuple[int, int]
"""Teacher layer behind which the first member of a pair ends, and which operator."""

CLEARLY_WORSE = 0.02
"""Nats per token on half of the held-out text: about twice the standard error of a difference on 2,000 tokens."""


@dataclass(frozen=True)
class RefitSearch(Planner):
    """Greedy search over pairs of neighbours and operators by held-out loss after a refit of the merged layer."""

    also: list[Operator] = field(default_factory=list)
    """Operators tried beside the recipe's, at the places where that promised most."""
    candidates: int = 8
    """How many pairs and operators each round after the first tries."""
    fit_sequences: int = 16
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

    def check_family(self, layout: LayerLayout) -> None:
        """The layers have an MLP projection, and all of `also` serve them."""
        if layout.mlp is None:
            raise InputError(
                f"RefitSearch refits MLP projections, {layout.model_type} layers have experts: use GreedyPlanner or "
                "OneShotRanking."
            )
        for each in self.also:
            each.check(layout)

    def check_text(self, batches: Sequence[Batch]) -> None:
        """There is something to fit on, and something else to judge by, with labels."""
        if len(one_by_one(batches)) < 2:
            raise InputError(
                "RefitSearch has one calibration sequence and needs some to fit and others to judge by: give "
                "more (data.calibration_blocks of a TextDataModule)."
            )
        _, held_out = self._split(batches)
        if not any((next_tokens(batch) != -100).any() for batch in held_out):
            raise InputError(
                "RefitSearch judges by calibration sequences of which no token is scored (labels are -100): raise "
                "planner.held_out_sequences, or calibrate on text with more labels."
            )

    def plan(self, calibration: Calibration, operator: Operator, target: int) -> tuple[MergeStep, ...]:
        """One pair per step, the best found; the model is restored bit for bit.

        Raises:
            InputError: If there are fewer than two calibration sequences, or the family's MLPs consist of experts.
        """
        self.check_family(calibration.layout)
        self.check_text(calibration.batches)
        operator.check(calibration.layout)
        fitting, held_out = self._texts(calibration)
        operators = [operator, *(other for other in self.also if other != operator)]
        history = calibration.past
        bench = _Bench(calibration, operators, fitting, held_out, self.strength)
        damage: dict[Look, float] = {}
        steps: list[MergeStep] = []
        with ExitStack() as accepted:
            for _ in track(range(max(0, calibration.depth - target)), "searching merges"):
                found: dict[Look, _Candidate] = {}
                for looks in self._waves(damage, history, len(operators), bench.turns):
                    found |= bench.look(looks, history.lineage, found.values())
                    damage.update({look: candidate.damage for look, candidate in found.items()})
                best = min((one for one in found.values() if one.judged), key=lambda one: one.loss)
                accepted.enter_context(surgery.trial(calibration.model, best.step, measure=best.measure))
                layer = calibration.layout.layers_of(calibration.model)[best.step.base]
                for name, values in best.refitted.items():
                    layer.get_parameter(name).data = values
                history = history.append(best.step)
                steps.append(replace(best.step, scores={"perplexity_after_refit": exp(min(best.loss, 700.0))}))
                bench.refresh(best.step.base)
        return with_weight_cosines(calibration, steps)

    def _waves(
        self, damage: dict[Look, float], history: MergeHistory, operators: int, turns: Sequence[float]
    ) -> Iterable[list[Look]]:
        """What a round looks at, the most promising first; `damage` fills up between one wave and the next."""
        ends = [ancestors[-1] for ancestors in history.lineage[:-1]]
        if not damage:
            yield [(end, 0) for end in sorted(ends, key=lambda end: turns[end + 1])]
            best = sorted(ends, key=lambda end: damage[end, 0])[: self.candidates]
            yield [(end, number) for end in best for number in range(1, operators)]
            return
        ranked = sorted((look for look in damage if look[0] in ends), key=damage.__getitem__)[: self.candidates]
        base = history.steps[-1].base
        beside = [(history.lineage[place][-1], 0) for place in (base - 1, base) if 0 <= place < history.depth - 1]
        yield ranked + [look for look in beside if look not in ranked]

    def _texts(self, calibration: Calibration) -> tuple[list[Batch], list[Batch]]:
        """Batches to fit on, and two halves to judge by."""
        fitting, held_out = self._split(calibration.batches)
        half = -(-sum(each["input_ids"].numel() for each in held_out) // 2)
        return regrouped(fitting, calibration.model), regrouped(held_out, calibration.model, tokens=half)

    def _split(self, batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
        """Single sequences to fit on, and others to judge by, both spread over the calibration text."""
        single = one_by_one(batches)
        wanted = min(self.fit_sequences + self.held_out_sequences, len(single))
        single = [single[place * len(single) // wanted] for place in range(wanted)]
        judges = held_out_sequences(wanted, self.held_out_sequences / (self.fit_sequences + self.held_out_sequences))
        return (
            [each for place, each in enumerate(single) if place not in judges],
            [each for place, each in enumerate(single) if place in judges],
        )


@dataclass(frozen=True)
class _Candidate:
    step: MergeStep
    loss: float
    """Held-out loss in nats per token, over what was judged."""
    damage: float
    """By how much that is more than before the merge."""
    judged: bool
    """Whether all of the held-out text was."""
    activity: Sequence[Activity]
    refitted: dict[str, Tensor]
    """Values of the merged layer's refitted parameters, by their names in the layer; emptied once another is better."""

    def measure(self, wanted: Sequence[int]) -> Sequence[Activity]:
        """The activity by which the members were judged."""
        return self.activity


class _Bench:
    """The streams before every layer of the model as it stands, and behind every layer of the teacher."""

    def __init__(
        self,
        calibration: Calibration,
        operators: Sequence[Operator],
        fitting: Sequence[Batch],
        held_out: Sequence[Batch],
        strength: float,
    ) -> None:
        self._model, self._layout, self._operators = calibration.model, calibration.layout, operators
        self._ridge = RidgeRefit(layers="merged", projections="mlp", strengths=[strength])
        self._held_out = held_out
        self._fit, self._held = Stream(calibration.model, fitting), Stream(calibration.model, held_out)
        original = calibration.original if calibration.original is not None else surgery.second_view(calibration.model)
        self._teacher = Stream(original, fitting)
        self._fit_before, self._held_before = [list(self._fit.states)], [list(self._held.states)]
        self._targets: list[list[Tensor]] = []
        self.turns: list[float] = []
        """How far each teacher layer turns the stream, 1 - mean cosine: who is tried first."""
        for layer in track(self._layout.layers_of(original), "reading text with the original model"):
            before = self._teacher.states[0]
            self._teacher.advance(layer)
            self._targets.append(list(self._teacher.states))
            self.turns.append(1 - cosine_similarity(before.float(), self._teacher.states[0].float(), -1).mean().item())
        if calibration.original is None:
            # The student is its own original as yet: its states are the teacher's, and held once.
            self._fit_before += self._targets[:-1]
        self._run_on()
        calibration.check_stream([*self.turns, *(loss for loss, _ in self._unmerged)])

    def refresh(self, place: int) -> None:
        """Runs the text again from this layer on, after a merge there."""
        for before in (self._fit_before, self._held_before):
            del before[place + 1 :]
        self._run_on()

    def _run_on(self) -> None:
        """Runs the text from the last stream that is kept to the one before the last layer, and judges the model."""
        layers = self._layout.layers_of(self._model)
        for stream, before in ((self._fit, self._fit_before), (self._held, self._held_before)):
            stream.states = list(before[-1])
            for layer in layers[len(before) - 1 : len(layers) - 1]:
                stream.advance(layer)
                before.append(list(stream.states))
        self._unmerged = self._losses([layers[-1]])

    def look(self, looks: Sequence[Look], lineage: Lineage, rivals: Iterable[_Candidate]) -> dict[Look, _Candidate]:
        """Tries pairs and operators; one that is clearly worse than the best so far may be judged by half the text."""
        leader = min((rival for rival in rivals if rival.judged), key=lambda one: one.loss, default=None)
        place_of = {ancestors[-1]: place for place, ancestors in enumerate(lineage)}
        found: dict[Look, _Candidate] = {}
        activities: dict[int, Sequence[Activity]] = {}
        for end, number in track(looks, "trying merges behind a refit"):
            place, operator = place_of[end], self._operators[number]
            if operator.needs_activity and place not in activities:
                activities[place] = self._activity(place)
            activity = activities.get(place, ()) if operator.needs_activity else ()
            target = self._targets[lineage[place + 1][-1]]
            limit = inf if leader is None else leader.damage + CLEARLY_WORSE
            candidate = found[end, number] = self._try(place, operator, activity, target, limit)
            if not candidate.judged or (leader is not None and candidate.loss >= leader.loss):
                candidate.refitted.clear()
                continue
            if leader is not None:
                leader.refitted.clear()
            leader = candidate
        return found

    def _activity(self, place: int) -> Sequence[Activity]:
        """What both members of a pair do on the fitting text."""
        pair = list(self._layout.layers_of(self._model))[place : place + 2]
        with recording(pair, self._layout, kv_heads_of(self._model.config)) as recorder:
            for member, states in zip(pair, self._fit_before[place : place + 2], strict=True):
                for index, mask in enumerate(self._fit.masks):
                    recorder.mask_BT = mask
                    self._fit.run(member, index, states[index])
        return recorder.activities()

    def _try(
        self, place: int, operator: Operator, activity: Sequence[Activity], target: Sequence[Tensor], limit: float
    ) -> _Candidate:
        """Merges, refits, judges, restores."""
        assert self._layout.mlp is not None
        step = new_step((place, place + 1), operator, uniform((place, place + 1)))
        self._fit.states, self._held.states = list(self._fit_before[place]), list(self._held_before[place])
        self._teacher.states = list(target)
        with surgery.trial(self._model, step, measure=lambda _: activity):
            layers = list(self._layout.layers_of(self._model))
            self._ridge.refit_mlp(self._fit, self._teacher, layers[place])
            consumer = layers[place].get_submodule(self._layout.mlp.consumer)
            refitted = {f"{self._layout.mlp.consumer}.{name}": p.data for name, p in consumer.named_parameters()}
            losses = self._losses(layers[place:], limit)
        loss, tokens = sum(part for part, _ in losses), sum(number for _, number in losses)
        loss = inf if isnan(loss) else loss
        damage = (loss - sum(part for part, _ in self._unmerged[: len(losses)])) / tokens
        return _Candidate(step, loss / tokens, damage, len(losses) == len(self._unmerged), activity, refitted)

    def _losses(self, layers: Sequence[nn.Module], limit: float = inf) -> list[tuple[float, int]]:
        """Per part of the held-out text, from where it stands: the loss in nats behind these layers, and its tokens.

        Ends with the first part after which the damage per token is beyond the limit.
        """
        parts: list[tuple[float, int]] = []
        lost, count = 0.0, 0
        for state, batch in zip(self._held.last_states(*layers), self._held_out, strict=True):
            parts.append(token_loss(self._model, state, batch))
            if limit < inf:
                lost += parts[-1][0] - self._unmerged[len(parts) - 1][0]
                count += parts[-1][1]
                if not lost <= limit * count:
                    break
        return parts
