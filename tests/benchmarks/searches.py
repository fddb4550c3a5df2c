"""What LaCo's and CoMe's searches need: `python tests/benchmarks/searches.py --text wikitext2_tokens_valid.txt`.

    laco    ThresholdPlanner with the settings of recipes/laco_released.yaml, from the dense model to 24 layers
    come    ProgressivePlanner + Concat from 30 to 22 layers, 16 windows of 512 tokens, planned and executed

Forward work is counted in layers x tokens, by hooks; a pass of the head counts as many layers as it has times a
layer's weights. LaCo's released notebook deep-copies the model for every attempt and runs the trial *and* the
reference model whole, heads included, so that on the same path of attempts its work follows from the depths seen:

    released = tokens * sum over attempts of (depth of the trial + head + depth of the original + head)

`laco_forward_ratio` = ours / released; `laco_forward_ratio_layers` counts no heads on either side, which flatters the
notebook. The path is the one that our search took, on the same tokens.

Peak memory is that of a process of its own, which imports, loads the model and searches; text is tokenised elsewhere.
`loaded_rss_bytes` is its peak before the search begins, `rss_limit_bytes` = 1.3 x the weights + 0.6e9.
The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune.demo import DEMO
from lcprune.distillation.teacher import load
from lcprune.merging import operators
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.collapse import collapse
from lcprune.merging.concat import Concat
from lcprune.merging.criteria import OutputSimilarity
from lcprune.merging.planners import ThresholdPlanner
from lcprune.merging.progressive import ProgressivePlanner
from lcprune.models import load_tokenizer
from tests.benchmarks.memory import resident

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "laco_released.yaml"
COME_DEPTH, COME_WINDOWS, WINDOW = 22, 16, 512

Figures = dict[str, Any]


@dataclass
class Work:
    """Forward work, and the depths of the trials."""

    layer_tokens: int = 0
    """Tokens through a layer, summed over layers."""
    head_tokens: int = 0
    """Tokens through the head."""
    trial_depths: list[int] = field(default_factory=list)
    """Layers of the model in each attempt, in order."""

    def in_layers(self, head: float) -> float:
        """Layers x tokens, a head counting as so many layers."""
        return self.layer_tokens + head * self.head_tokens


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[Work]:
    """Counts what runs through the layers and the head inside the block, and the attempts that are judged."""
    work = Work()
    measure = OutputSimilarity.measure

    def see_layer(module: nn.Module, args: tuple[object, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        state = output[0] if isinstance(output, tuple) else output
        work.layer_tokens += state.shape[:-1].numel()

    def see_head(module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        work.head_tokens += output.shape[:-1].numel()

    def judged(criterion: OutputSimilarity, calibration: Calibration, states: Iterator[Tensor]) -> float:
        work.trial_depths.append(calibration.depth)
        return measure(criterion, calibration, states)

    handles = [layer.register_forward_hook(see_layer) for layer in layout_of(model.config).layers_of(model)]
    handles.append(model.get_output_embeddings().register_forward_hook(see_head))
    try:
        with patch.object(OutputSimilarity, "measure", judged):
            yield work
    finally:
        for handle in handles:
            handle.remove()


def laco(model: PreTrainedModel, batches: list[Batch]) -> Figures:
    """The search alone: seconds, and its forward work against the notebook's."""
    settings = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["collapse"]
    planner = ThresholdPlanner(**settings["planner"]["init_args"])
    operator = operators.from_spec({"class_path": settings["operator"]})
    layers = layout_of(model.config).layers_of(model)
    depth, tokens = len(layers), sum(batch["input_ids"].numel() for batch in batches)
    weights = sum(parameter.numel() for parameter in layers[0].parameters())
    head = model.get_output_embeddings().weight.numel() / weights
    began = time.perf_counter()
    with counting(model) as work:
        steps = planner.plan(Calibration(model, batches), operator, settings["schedule"]["init_args"]["target_depth"])
    seconds = time.perf_counter() - began
    whole = sum(trial + depth for trial in work.trial_depths)
    heads = 2 * len(work.trial_depths)
    return {
        "laco_forward_ratio": round(work.in_layers(head) / (tokens * (whole + head * heads)), 4),
        "laco_forward_ratio_layers": round(work.layer_tokens / (tokens * whole), 4),
        "laco_seconds": round(seconds, 1),
        "laco_attempts": len(work.trial_depths),
        "laco_depth": depth - sum(step.absorbed for step in steps),
    }


def come(model: PreTrainedModel, batches: list[Batch]) -> Figures:
    """Plan and execution."""
    began = time.perf_counter()
    history = collapse(model, batches, target_depth=COME_DEPTH, planner=ProgressivePlanner(), operator=Concat())
    seconds = time.perf_counter() - began
    return {"come_seconds": round(seconds, 1), "come_merges": [list(step.group) for step in history.steps]}


SEARCHES: dict[str, Callable[[PreTrainedModel, list[Batch]], Figures]] = {"laco": laco, "come": come}


def alone(name: str, given: argparse.Namespace) -> None:
    """One search in this process; prints what it needed."""
    model = load(given.model, given.dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    batches = [{"input_ids": window[None]} for window in torch.load(given.windows)]
    loaded = resident("VmHWM")
    figures = SEARCHES[name](model, batches)
    figures |= {f"{name}_rss_bytes": resident("VmHWM"), f"{name}_loaded_rss_bytes": loaded, "weights_bytes": weights}
    print(json.dumps(figures))


def in_process_of_its_own(name: str, windows: Path, given: argparse.Namespace) -> Figures:
    """The figures of one search."""
    arguments = ["--alone", name, "--windows", str(windows), "--model", given.model, "--dtype", given.dtype]
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--text", type=Path, help="the WikiText-2 validation text")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--search", choices=SEARCHES, nargs="+", default=list(SEARCHES), help="which searches")
    parser.add_argument("--alone", choices=SEARCHES, help=argparse.SUPPRESS)
    parser.add_argument("--windows", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        alone(given.alone, given)
        return
    if given.text is None:
        parser.error("--text is missing")
    text = given.text.read_text(encoding="utf-8")
    tokens = torch.tensor(load_tokenizer(given.model)(text, add_special_tokens=False, verbose=False).input_ids)
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["data"]
    number = {"laco": recipe["calibration_blocks"], "come": COME_WINDOWS}
    length = {"laco": recipe["block_size"], "come": WINDOW}
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.search:
            windows = Path(folder) / f"{name}.pt"
            torch.save(tokens[: number[name] * length[name]].reshape(number[name], length[name]).clone(), windows)
            figures |= in_process_of_its_own(name, windows, given)
    figures["rss_limit_bytes"] = int(1.3 * int(figures["weights_bytes"]) + 0.6e9)
    figures["device"] = f"cpu, {torch.get_num_threads()} threads, {given.dtype}"
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
