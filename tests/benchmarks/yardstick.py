"""Perplexity after merging without any training: the development yardstick, so that the test text stays unseen.

    calibration   the first 16 windows of 512 tokens of the WikiText-2 validation text
    evaluation    32 windows of 512 tokens from the start of its second half (token 136,934 of SmolLM2's tokenizer)

Windows of the running text, tokenised without special tokens; mean cross-entropy per token inside a window.

    python tests/benchmarks/yardstick.py --text wikitext2_tokens_valid.txt --method bi-drop bi-drop-ridge
    python tests/benchmarks/yardstick.py --text wikitext2_tokens_valid.txt --method 'come-*' 'come.concat>drop-ridge' \\
        --results runs/table.jsonl --table
    python tests/benchmarks/yardstick.py --text wikitext2_tokens_valid.txt --method best --windows 128

Methods and patterns of them: see methods.py. What has been measured in bfloat16 is in yardstick.jsonl beside this file:

    python tests/benchmarks/yardstick.py --text wikitext2_tokens_valid.txt --method '*' --dtype bfloat16 \\
        --results tests/benchmarks/yardstick.jsonl --grids

goes on with it (with --report it only prints). With --results every figure is appended to a file as it is measured, and
what the file holds already is not measured again; --report measures nothing and shows what is there.

SmolLM2-135M-Instruct, bfloat16: dense 30.8; bi-drop 45.9, 66.9 and 101.7 at 27, 24 and 22 layers. The last line printed
is one JSON object: method -> depth -> {"perplexity" (null: the planner stops before), "ratio" to the dense model,
"seconds" of planning, merging and refitting, without the evaluation, "groups" of layers that became one and, where
layers are ranked and dropped, "removed" in order of going}. A nested plan is made to the shallowest depth asked for:
its seconds are the same at all depths.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune.demo import DEMO
from lcprune.distillation.teacher import load
from lcprune.errors import InputError
from lcprune.merging.calibration import Batch, evaluating, hidden_states, token_loss
from lcprune.merging.criteria import perplexity
from lcprune.models import load_tokenizer
from tests.benchmarks.bench import Bench
from tests.benchmarks.methods import DEFAULT, METHODS, OPERATORS, PLANNERS, REFITS, Method, named
from tests.benchmarks.results import Result, Results, grids, shown, table

__all__ = ["METHODS", "Yardstick"]

WINDOW = 512
CALIBRATION_WINDOWS, EVALUATION_WINDOWS = 16, 32
EVALUATION_START = 136_934


@dataclass(frozen=True)
class Yardstick:
    """Both halves of the text, cut into windows."""

    calibration: list[Batch]
    evaluation: list[Batch]

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase, number: int = CALIBRATION_WINDOWS) -> "Yardstick":
        """The windows of a text, one to a batch, so many of them for calibration."""
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        end = EVALUATION_START + EVALUATION_WINDOWS * WINDOW
        if len(tokens) < end:
            raise ValueError(f"The text has {len(tokens):,} tokens, the yardstick ends at token {end:,}.")
        return cls(_windows(tokens, 0, number), _windows(tokens, EVALUATION_START, EVALUATION_WINDOWS))

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
        bench = Bench(model, self.calibration, self.evaluation, depths)
        return {depth: bench.measure(method, depth, dense) for depth in depths}


def _windows(tokens: Tensor, start: int, number: int) -> list[Batch]:
    """So many windows of the running text, one to a batch."""
    return [{"input_ids": window[None]} for window in tokens[start : start + number * WINDOW].split(WINDOW)]


def measure_all(
    methods: Mapping[str, Method], depths: Sequence[int], results: Results, bench: Callable[[], Bench]
) -> None:
    """Measures what the results lack, methods with the same plan together; the model is only loaded if it must be."""
    dense = results.get("dense")
    if dense is None:
        value = bench().perplexity(bench().model)
        dense = results.add("dense", {"depth": bench().depth, "perplexity": value, "ratio": 1.0})
    print(f"dense  {dense['perplexity']:.2f}", flush=True)
    plans: dict[str, list[str]] = {}
    for name, method in methods.items():
        plans.setdefault(repr((method.planners, method.operator, method.instead)), []).append(name)
    for names in plans.values():
        for depth in sorted(depths, reverse=True):
            for name in names:
                what = cell(name, methods[name], depth)
                if results.get(what) is None:
                    results.add(what, bench().measure(methods[name], depth, dense["perplexity"]))
                    print(f"{name:28}  {depth} layers  {shown(results.get(what))}", flush=True)


def cell(name: str, method: Method, depth: int) -> str:
    """What a figure is called in a file: with a hash of the settings, so that no other settings' is taken for it."""
    return f"{name} at {depth} [{sha256(repr(method).encode()).hexdigest()[:8]}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the methods named, prints figures as they come, a table if wanted, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--text", type=Path, required=True, help="the WikiText-2 validation text")
    parser.add_argument("--depths", type=int, nargs="+", default=[27, 24, 22, 20])
    parser.add_argument("--windows", type=int, default=CALIBRATION_WINDOWS, help="calibration windows of 512 tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--method", nargs="+", default=DEFAULT, metavar="METHOD", help="names and patterns")
    parser.add_argument("--results", type=Path, help="JSON lines: figures are read from there and appended")
    parser.add_argument("--table", action="store_true", help="print a Markdown table")
    parser.add_argument(
        "--grids", action="store_true", help="print operators by refits, a Markdown table for each planner"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    try:
        methods = named(options.method)
    except InputError as error:
        parser.error(str(error))
    settings = {name: getattr(options, name) for name in ("model", "dtype", "windows")}
    results = Results(options.results, settings)

    @cache
    def bench() -> Bench:
        text = options.text.read_text(encoding="utf-8")
        yardstick = Yardstick.of(text, load_tokenizer(options.model), options.windows)
        model = load(options.model, options.dtype)
        return Bench(model, yardstick.calibration, yardstick.evaluation, options.depths, results)

    if not options.report:
        measure_all(methods, options.depths, results, bench)
    found: dict[str, dict[int, Result]] = {}
    for name, method in methods.items():
        cells = {depth: results.get(cell(name, method, depth)) for depth in options.depths}
        if any(cells.values()):
            found[name] = {depth: result for depth, result in cells.items() if result is not None}
    if options.table:
        print(table(found, options.depths))
    if options.grids:
        print(grids(found, options.depths, list(PLANNERS), list(OPERATORS), list(REFITS)))
    dense = results.get("dense")
    whole = {"dense": {dense.pop("depth"): dense}} if dense is not None else {}
    print(json.dumps(whole | found))


if __name__ == "__main__":
    main()
