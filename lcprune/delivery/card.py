"""The model card of an exported student: what was merged, from which teacher layers, on what text, what it measured.

Markdown with a YAML front matter, as the Hugging Face hub reads it. Everything it says is derived from the history, the
recipe and the figures; it states nothing that nobody measured. `lcprune evaluate` adds a section of its own.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

import yaml

from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.models import License

METHODS = {
    "ShortGPT": "Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2403.03853",
    "LaCo": "Yang et al., LaCo: Large Language Model Pruning via Layer Collapse, 2402.11187",
    "MKA": "Liu et al., Pruning via Merging: Compressing LLMs via Manifold Alignment Based Layer Merging, 2406.16330",
    "CoMe": "Wang et al., Layer as Puzzle Pieces: Compressing Large Language Models through Layer Concatenation, "
    "2510.15304",
    "Deeper Layers": "Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2403.17887",
    "SLEB": "Song et al., SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer "
    "Blocks, 2402.09025",
    "Prune&Comp": "Chen et al., Prune&Comp: Free Lunch for Layer-Pruned LLMs via Iterative Pruning with Magnitude "
    "Compensation, 2507.18212",
}
"""Authors, title and arXiv number by method."""

METHOD_OF = {
    "Drop": "ShortGPT",
    "Rdsc": "LaCo",
    "ReplaceWithLast": "LaCo",
    "WeightedAverage": "MKA",
    "Concat": "CoMe",
    "MagnitudeCompensation": "Prune&Comp",
    "OneShotRanking": "ShortGPT",
    "ContiguousBlock": "Deeper Layers",
    "ThresholdPlanner": "LaCo",
    "ProgressivePlanner": "CoMe",
    "GreedyPlanner": "SLEB",
}
"""The paper an operator, a refit or a planner comes from; one of the user's own has none."""
PLANNER = "OneShotRanking"
"""The planner of a recipe that names none."""

BUILT_IN = " The text is the language reference that Python carries (`pydoc_data.topics`)."

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


HOW_TO_LOAD = "## How to load it\n"
EVALUATION = "## Evaluation\n"


def model_card(
    history: MergeHistory,
    *,
    figures: Mapping[str, float],
    license: License | str | None = None,
    recipe: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        history: The merges that made the student.
        figures: What was measured or counted, by name; printed in the order given.
        license: The base model's licence, or its name as the hub spells it ("apache-2.0"); None = it is not known.
        recipe: Text of the resolved recipe, for what it says about data; of paths only the last name is told.
    """
    terms = License(license) if isinstance(license, str) else license
    return "\n".join(
        [
            _front_matter(history, terms),
            f"# {short_name(history.teacher)}, {history.teacher_depth} -> {history.depth} layers\n",
            f"A shorter version of `{_told(history.teacher)}`, made with lcprune: runs of consecutive layers "
            "were merged into one. `history.json` holds the same account for programs.\n",
            f"Licence of the base model: {terms or 'unknown: see the base model'}.\n",
            "## What was merged\n",
            "Layers are numbered as they stood when the merge began.\n",
            _table(("step", "global_step", "group", "operator", "shares"), _step_rows(history.steps)),
            "## Lineage\n",
            _table(("student layer", "teacher layers"), _lineage_rows(history)),
            *_data(recipe),
            "## Figures\n",
            _table(("figure", "value"), [(name, _number(value)) for name, value in figures.items()]),
            HOW_TO_LOAD,
            "Plain transformers; lcprune is not needed.\n",
            USAGE,
            *_citations({*_made_by(history.steps), *_planned_by(recipe, history.steps)}),
        ]
    )


def with_evaluation(card: str, rows: Sequence[Sequence[str]], note: str) -> str:
    """The card with these figures as its section about evaluation, instead of earlier ones.

    Args:
        card: Of `model_card`, perhaps edited since.
        rows: Header and lines of the table.
        note: What they were measured on.
    """
    section = f"{EVALUATION}\n{_table(rows[0], rows[1:])}\n{note}\n\n"
    before, heading, behind = card.partition(EVALUATION)
    if not heading:
        before, heading, behind = card.partition(HOW_TO_LOAD)
        return before + section + heading + behind
    rest = re.search(r"^## ", behind, re.MULTILINE)
    return before + section + (behind[rest.start() :] if rest else "")


def _data(recipe: str | None) -> list[str]:
    """The recipe's own words about its text, without what is not set."""
    content = yaml.safe_load(recipe) if recipe is not None else None
    data = content.get("data") if isinstance(content, Mapping) else None
    if not isinstance(data, Mapping):
        return []
    told = {key: _without_folders(value) for key, value in data.items() if value is not None and key != "tokenizer"}
    source = "" if {"path", "dataset", "generate"} & told.keys() else BUILT_IN
    return ["## Data\n", f"What layers were chosen, fitted or trained on, as in `recipe.yaml`.{source}\n", _yaml(told)]


def _without_folders(value: object) -> object:
    """Of a path its last name: where it lies on a machine is nobody else's business."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and value.startswith(("/", "~", ".")) else value


def _yaml(content: Mapping[object, object]) -> str:
    return f"```yaml\n{yaml.safe_dump(dict(content), sort_keys=False)}```\n"


def _told(teacher: str) -> str:
    """A model on the hub by its name, one of this machine without the folders that it lies in."""
    if not teacher:
        return "an unnamed model"
    return teacher if _is_of_the_hub(teacher) else short_name(teacher)


def _is_of_the_hub(teacher: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", teacher) is not None and not Path(teacher).exists()


def _front_matter(history: MergeHistory, license: License | None) -> str:
    trained = any(step.global_step is not None for step in history.steps)
    fields: dict[str, object] = {"license": "unknown"} if license is None else license.fields()
    # The hub refuses a base_model that is not one of its names, and a local path is nobody else's business.
    if _is_of_the_hub(history.teacher):
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
            step.operator_name,
            ", ".join(f"{share:.3g}" for share in step.shares),
        )
        for number, step in enumerate(steps, start=1)
    ]


def _lineage_rows(history: MergeHistory) -> list[tuple[str, ...]]:
    return [(str(layer), _layers(members)) for layer, members in enumerate(history.lineage)]


def _made_by(steps: Sequence[MergeStep]) -> Iterator[str]:
    """Operators and refits, by the history."""
    for step in steps:
        yield step.operator_name
        if step.refit_name is not None:
            yield step.refit_name


def _planned_by(recipe: str | None, steps: Sequence[MergeStep]) -> Iterator[str]:
    """Planners, by the recipe: a history does not say them."""
    content = yaml.safe_load(recipe) if recipe is not None else None
    collapse = _part(content, "collapse")
    before = collapse.get("schedule") is None and _part(content, "model").get("student") is not None
    if not collapse or not steps or before:  # this recipe has planned nothing
        return
    stages = collapse.get("stages")
    for part in (collapse, *(stages if isinstance(stages, list) else ())):
        named = _part(part, "planner").get("class_path")
        if named is not None or part is collapse:
            yield str(named or PLANNER).rpartition(".")[2]


def _part(content: object, key: str) -> Mapping[str, object]:
    """A mapping inside a recipe; empty where there is none."""
    part = content.get(key) if isinstance(content, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _citations(names: Collection[str]) -> list[str]:
    papers = []
    for method, text in METHODS.items():
        if used := sorted(name for name in names if METHOD_OF.get(name) == method):
            papers.append(f"- {text}. https://arxiv.org/abs/{text.split()[-1]} (`{'`, `'.join(used)}`)")
    return ["## Methods\n", *papers, ""] if papers else []


def short_name(model: str) -> str:
    """The last part of a hub name or of a path."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] or "A causal language model"


def _layers(indices: Iterable[int]) -> str:
    return ", ".join(map(str, indices))


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
