"""Perplexity after merging without any training: the development yardstick, so that the test text stays unseen.

    calibration   the first 16 windows of 512 tokens of the WikiText-2 validation text
    evaluation    32 windows of 512 tokens from the start of its second half (token 136,934 of SmolLM2's tokenizer)

Windows of the running text, tokenised without special tokens; mean cross-entropy per token inside a window.

    python tests/benchmarks/yardstick.py --text wikitext2_tokens_valid.txt --method bi-drop bi-drop-ridge
    python tests/benchmarks/yardstick.py --text wikitext2_tokens_valid.txt --method best --windows 128

A method is PLANNER-OPERATOR or PLANNER-OPERATOR-REFIT, see the tables below.

SmolLM2-135M-Instruct, bfloat16: dense 30.8; bi-drop 45.9, 66.9 and 101.7 at 27, 24 and 22 layers. A method takes about
ten seconds per depth on two cores, trial-drop two minutes more. The last line printed is one JSON object:
method -> depth -> {"perplexity", "ratio" to the dense model, "seconds" since the method began, and, where whole layers
go, "removed" in order of going}.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lcprune.demo import DEMO, load_tokenizer
from lcprune.distillation.teacher import load
from lcprune.merging import surgery
from lcprune.merging.calibration import Batch, Calibration, evaluating, hidden_states, token_loss
from lcprune.merging.collapse import execute, with_refit
from lcprune.merging.concat import Concat
from lcprune.merging.criteria import BlockInfluence, Criterion, TrialPerplexity, perplexity
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, Rdsc, ReplaceWithLast, WeightedAverage
from lcprune.merging.planners import ContiguousBlock, OneShotRanking, Planner
from lcprune.merging.refit import MagnitudeCompensation, Refit, RidgeRefit
from lcprune.merging.search import RefitSearch

WINDOW = 512
CALIBRATION_WINDOWS, EVALUATION_WINDOWS = 16, 32
EVALUATION_START = 136_934

Result = dict[str, float | list[int] | list[list[int]]]


@dataclass(frozen=True)
class Method:
    """Which layers merge, into what, and how the outcome is repaired."""

    planner: Planner
    operator: Operator
    refit: Refit | None = None


PLANNERS: dict[str, Planner] = {
    "bi": OneShotRanking(BlockInfluence()),
    "block": ContiguousBlock(),
    "trial": OneShotRanking(TrialPerplexity()),
    "search": RefitSearch(),
}
OPERATORS: dict[str, Operator] = {
    "drop": Drop(),
    "first": Drop(keep="first"),
    "average": WeightedAverage(),
    "last": ReplaceWithLast(),
    "rdsc": Rdsc(),
    "concat": Concat(),
    "joint": Concat(selection="joint"),
}
REFITS: dict[str, Refit | None] = {
    "": None,
    "-magnitude": MagnitudeCompensation(),
    "-mlp": RidgeRefit(layers="merged", projections="mlp"),
    "-merged": RidgeRefit(layers="merged"),
    "-ridge": RidgeRefit(),
}
METHODS = {
    f"{planner}-{operator}{refit}": Method(PLANNERS[planner], OPERATORS[operator], REFITS[refit])
    for planner, operator, refit in product(PLANNERS, OPERATORS, REFITS)
} | {"best": Method(RefitSearch(also=[Drop("last"), Concat(selection="joint")]), Drop("first"), RidgeRefit())}
DEFAULT = [
    "bi-drop", "block-first", "trial-drop", "bi-average", "bi-last", "bi-rdsc", "bi-concat", "bi-joint",
    "bi-drop-magnitude", "bi-drop-mlp", "bi-drop-merged", "bi-drop-ridge", "bi-average-ridge", "bi-concat-ridge",
    "bi-joint-ridge", "search-first-ridge", "best",
]  # fmt: skip


@dataclass(frozen=True)
class Given(Criterion):
    """Scores taken once for all depths."""

    scores: tuple[float, ...]

    def score(self, calibration: Calibration) -> tuple[float, ...]:
        """The scores as given."""
        return self.scores


@dataclass(frozen=True)
class Yardstick:
    """Both halves of the text, cut into windows."""

    calibration: list[Batch]
    evaluation: list[Batch]

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase, windows: int = CALIBRATION_WINDOWS) -> "Yardstick":
        """The windows of a text, one to a batch."""
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        end = EVALUATION_START + EVALUATION_WINDOWS * WINDOW
        if len(tokens) < end:
            raise ValueError(f"The text has {len(tokens):,} tokens, the yardstick ends at token {end:,}.")
        return cls(_windows(tokens, 0, windows), _windows(tokens, EVALUATION_START, EVALUATION_WINDOWS))

    def perplexity(self, model: PreTrainedModel) -> float:
        """On the evaluation windows."""
        loss, count = 0.0, 0
        with evaluating(model):
            for batch in self.evaluation:
                window_loss, tokens = token_loss(model, hidden_states(model, batch), batch)
                loss, count = loss + window_loss, count + tokens
        return perplexity(loss, count)

    def measure(self, model: PreTrainedModel, method: Method, depths: Sequence[int], dense: float) -> dict[int, Result]:
        """The method at each depth, always from the model as it is given, which is left unchanged."""
        calibration = Calibration(model, self.calibration)
        planner, scores, started = method.planner, None, perf_counter()
        if isinstance(planner, OneShotRanking):
            scores = planner.criterion.score(calibration)
            planner = replace(planner, criterion=Given(scores))
        # A search's steps to the shallowest depth pass through the others.
        searched = planner.plan(calibration, method.operator, min(depths)) if isinstance(planner, RefitSearch) else None
        results: dict[int, Result] = {}
        for depth in depths:
            if searched is None:
                steps = planner.plan(calibration, method.operator, depth)
            else:
                steps = searched[: calibration.depth - depth]
            student = surgery.second_view(model)
            history = MergeHistory(calibration.depth, with_refit(steps, method.refit))
            execute(student, history, self.calibration)
            value = self.perplexity(student)
            results[depth] = {"perplexity": value, "ratio": value / dense, "seconds": perf_counter() - started}
            if scores is not None and method.operator == Drop():
                results[depth]["removed"] = sorted(_dropped(steps), key=scores.__getitem__)
            elif searched is not None:
                results[depth]["groups"] = [list(ancestors) for ancestors in history.lineage if len(ancestors) > 1]
        return results


def _windows(tokens: Tensor, start: int, number: int) -> list[Batch]:
    return [{"input_ids": window[None]} for window in tokens[start : start + number * WINDOW].split(WINDOW)]


def _dropped(steps: Iterable[MergeStep]) -> list[int]:
    """Layers that `Drop` by the largest share discards; the steps of OneShotRanking go from the back to the front."""
    return [
        layer
        for step in steps
        for layer in step.group
        if layer != step.group[max(range(len(step.group)), key=step.shares.__getitem__)]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the methods named and prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--text", type=Path, required=True, help="the WikiText-2 validation text")
    parser.add_argument("--depths", type=int, nargs="+", default=[27, 24, 22, 20])
    parser.add_argument("--windows", type=int, default=CALIBRATION_WINDOWS, help="calibration windows of 512 tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=DEFAULT, metavar="METHOD")
    options = parser.parse_args(arguments)

    yardstick = Yardstick.of(options.text.read_text(encoding="utf-8"), load_tokenizer(options.model), options.windows)
    model = load(options.model, options.dtype)
    dense = yardstick.perplexity(model)
    depth = Calibration(model, yardstick.calibration).depth
    results: dict[str, dict[int, Result]] = {"dense": {depth: {"perplexity": dense, "ratio": 1.0}}}
    _row("dense", results["dense"])
    for name in options.method:
        results[name] = yardstick.measure(model, METHODS[name], options.depths, dense)
        _row(name, results[name])
    print(json.dumps(results))


def _row(name: str, results: dict[int, Result]) -> None:
    print(
        f"{name:20}", *(f"{depth} layers {result['perplexity']:10.4g}" for depth, result in results.items()), sep="  "
    )


if __name__ == "__main__":
    main()
