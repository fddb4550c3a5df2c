"""The model card of an exported student: what was merged, from which teacher layers, and what it measured.

Markdown with a YAML front matter, as the Hugging Face hub reads it. Everything it says is derived from the history and
the figures; it states nothing that nobody measured.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import yaml

from lcprune.merging.lineage import MergeHistory, MergeStep

METHODS = {
    "ShortGPT": "Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2403.03853",
    "LaCo": "Yang et al., LaCo: Large Language Model Pruning via Layer Collapse, 2402.11187",
    "MKA": "Liu et al., Pruning via Merging: Compressing LLMs via Manifold Alignment Based Layer Merging, 2406.16330",
    "CoMe": "Wang et al., Layer as Puzzle Pieces: Compressing Large Language Models through Layer Concatenation, "
    "2510.15304",
}
"""Authors, title and arXiv number by method."""

METHOD_OF_OPERATOR = {
    "Drop": "ShortGPT",
    "Rdsc": "LaCo",
    "ReplaceWithLast": "LaCo",
    "WeightedAverage": "MKA",
    "Concat": "CoMe",
}
"""The paper an operator comes from; an operator of the user's own has none."""

USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The quick brown fox", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```
"""


def model_card(history: MergeHistory, *, figures: Mapping[str, float], license: str | None = None) -> str:
    """The text of README.md.

    Args:
        history: The merges that made the student.
        figures: What was measured or counted, by name; printed in the order given.
        license: The base model's licence as the hub spells it ("apache-2.0"); None when it is not known.
    """
    return "\n".join(
        [
            _front_matter(history, license),
            f"# {_short_name(history.teacher)}, {history.teacher_depth} -> {history.depth} layers\n",
            f"A shorter version of `{history.teacher or 'an unnamed model'}`, made with lcprune: runs of consecutive "
            "layers were merged into one. `history.json` holds the same account for programs.\n",
            f"Licence of the base model: {license or 'unknown: see the base model'}.\n",
            "## What was merged\n",
            "Layers are numbered as they stood when the merge began.\n",
            _table(("step", "global_step", "group", "operator", "shares"), _step_rows(history.steps)),
            "## Lineage\n",
            _table(("student layer", "teacher layers"), _lineage_rows(history)),
            "## Figures\n",
            _table(("figure", "value"), [(name, _number(value)) for name, value in figures.items()]),
            "## How to load it\n",
            "Plain transformers; lcprune is not needed.\n",
            USAGE,
            *_citations(history.steps),
        ]
    )


def _front_matter(history: MergeHistory, license: str | None) -> str:
    trained = any(step.global_step is not None for step in history.steps)
    fields: dict[str, object] = {"license": license or "unknown"}
    # The hub refuses a base_model that is not one of its names, and a local path is nobody else's business.
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", history.teacher):
        fields["base_model"] = history.teacher
    fields |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lcprune", "layer-merging", *(["distillation"] if trained else [])],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _step_rows(steps: Sequence[MergeStep]) -> list[tuple[str, ...]]:
    return [
        (
            str(number),
            "outside training" if step.global_step is None else str(step.global_step),
            _layers(step.group),
            operator_name(step),
            ", ".join(f"{share:.3g}" for share in step.shares),
        )
        for number, step in enumerate(steps, start=1)
    ]


def _lineage_rows(history: MergeHistory) -> list[tuple[str, ...]]:
    return [(str(layer), _layers(members)) for layer, members in enumerate(history.lineage)]


def operator_name(step: MergeStep) -> str:
    """The class name of the step's operator, without its module."""
    return str(step.operator["class_path"]).rpartition(".")[2]


def _citations(steps: Sequence[MergeStep]) -> list[str]:
    used = {METHOD_OF_OPERATOR[name] for name in map(operator_name, steps) if name in METHOD_OF_OPERATOR}
    papers = [f"- {text}. https://arxiv.org/abs/{text.split()[-1]}" for name, text in METHODS.items() if name in used]
    return ["## Methods\n", *papers, ""] if papers else []


def _short_name(teacher: str) -> str:
    return re.split(r"[/\\]", teacher.rstrip("/\\"))[-1] or "A causal language model"


def _layers(indices: Iterable[int]) -> str:
    return ", ".join(map(str, indices))


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
