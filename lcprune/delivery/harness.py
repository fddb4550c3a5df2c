"""Tasks of EleutherAI's lm-evaluation-harness (the extra `eval`), its own or those of a folder of its YAML files.

    prepare(["arc_easy"], folder)      named, found and fetched, before any weight is loaded
    answer(model, tokenizer, ...)      its figures, in the terms of evaluate.py

See https://github.com/EleutherAI/lm-evaluation-harness. This is the one module that imports it.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lcprune.delivery.evaluate import TaskFigures
from lcprune.errors import InputError, reason

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Results: TypeAlias = Mapping[str, Mapping[str, object]]
"""What lm-eval returns: `results`, `samples`, `group_subtasks` and `n-samples`, each by task."""

EXTRA = "lm-eval, which is not installed here: pip install 'lcprune[eval]'"
"""What is missing and how to get it."""
AT_ONCE = 8
"""Requests in a batch."""
PREFERRED = ("acc", "exact_match", "acc_norm")
"""Metrics that come first where a task has several."""


@dataclass(frozen=True)
class Tasks:
    """Tasks that are known and whose data are here."""

    names: tuple[str, ...]
    """As lm-eval knows them; tasks, groups or tags."""
    manager: "TaskManager"
    """lm-eval's own, which found them and loads them."""
    version: str
    """lm-eval's."""


def prepare(names: Sequence[str], folder: Path | None = None) -> Tasks:
    """Finds tasks and fetches what they ask about.

    Args:
        names: As lm-eval knows them.
        folder: Of more task files (YAML).

    Raises:
        InputError: lm-eval is missing, a task is unknown, or its data cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        known = f", or put {names[0]}.jsonl into --task-folder, which needs nothing" if names else ""
        raise InputError(f"--tasks {','.join(names)} needs {EXTRA}{known}.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            place = "" if folder is None else f", and {folder} has no {name}.jsonl"
            guess = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(f"--tasks {name} is no task of lm-eval {lm_eval.__version__}{guess}{place}.")
    try:
        manager.load(list(names))
    # What is not in the cache, a hub that cannot be reached, a YAML file that names what is not there.
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--tasks {','.join(names)} cannot be asked ({reason(error)}): their data are fetched once, with a "
            "network; or name task files of your own with --task-folder."
        ) from error
    return Tasks(tuple(names), manager, lm_eval.__version__)


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, limit: int | None
) -> dict[str, TaskFigures]:
    """A model's figures on every task, by name.

    Args:
        model: Not changed.
        tokenizer: The model's.
        tasks: That `prepare` has found.
        limit: At most so many questions of each; lm-eval takes the first ones.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=AT_ONCE),
        tasks=list(tasks.names),
        task_manager=tasks.manager,
        limit=limit,
        log_samples=True,
    )
    return {name: _figures(results, name) for name in _asked(tasks, results)}


def _asked(tasks: Tasks, results: Results) -> list[str]:
    """What was asked for, a tag (which has no figures of its own) by its tasks."""
    own = [name for name in tasks.names if name in results["results"]]
    inside = {leaf for name in own for leaf in _leaves(results, name)}
    return own + [name for name in results["samples"] if name not in inside]


def _leaves(results: Results, name: str) -> list[str]:
    """The tasks that a task or group consists of."""
    if name in results["samples"]:
        return [name]
    below = results.get("group_subtasks", {}).get(name, [])
    assert isinstance(below, list)
    return [leaf for child in below for leaf in _leaves(results, child)]


def _figures(results: Results, name: str) -> TaskFigures:
    found = results["results"][name]
    assert isinstance(found, Mapping)
    # lm-eval's keys are "metric,filter"; the filter "none" is the usual one.
    values = {
        key.removesuffix(",none"): float(value)
        for key, value in found.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }
    order = sorted(values, key=lambda key: PREFERRED.index(key) if key in PREFERRED else len(PREFERRED))
    metric, _, way = order[0].partition(",")
    error = found.get(f"{metric}_stderr,{way or 'none'}")
    return TaskFigures(
        {key: values[key] for key in order},
        rows=sum(results["n-samples"][leaf]["effective"] for leaf in _leaves(results, name)),  # type: ignore[index, misc]
        scores=_scores(results, name, metric, way or "none"),
        stderr=float(error) if isinstance(error, int | float) else None,
        lower_is_better=not _higher_is_better(results, name, metric),
    )


def _higher_is_better(results: Results, name: str, metric: str) -> bool:
    """By lm-eval's own account of a task, of a group by that of its first task; where it has none, yes."""
    known = results.get("higher_is_better", {})
    accounts = [known.get(one) for one in (name, *_leaves(results, name))]
    told = [account[metric] for account in accounts if isinstance(account, Mapping) and account.get(metric) is not None]
    return bool(told[0]) if told else True


def _scores(results: Results, name: str, metric: str, way: str) -> tuple[float, ...]:
    """A metric question by question, of all tasks of a group; empty where a question has none by itself."""
    samples = [sample for leaf in _leaves(results, name) for sample in results["samples"][leaf]]  # type: ignore[attr-defined]
    mine = [sample.get(metric) for sample in samples if sample.get("filter", way) == way]
    return tuple(map(float, mine)) if all(isinstance(value, int | float) for value in mine) else ()
