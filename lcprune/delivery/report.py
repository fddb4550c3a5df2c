"""One HTML file about one run or several, and its pictures beside it.

    report.html            everything inside, in both themes
    report-loss.png ...    the same pictures on white
    report-tree.svg        the family tree

With several runs the files of the first are report-1-loss.png and so on. What is missing on the disk, or could not be
computed, is a sentence in the report, never a failure.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcprune import models
from lcprune.delivery import page, pictures, sections
from lcprune.delivery.card import short_name
from lcprune.delivery.export import RECIPE
from lcprune.delivery.page import Picture, RunPage
from lcprune.delivery.provenance import here_and_now
from lcprune.delivery.runs import STUDENT, Run
from lcprune.delivery.sections import Look
from lcprune.delivery.tree import family_tree
from lcprune.delivery.wording import headlines, title
from lcprune.files import write_bytes, write_text
from lcprune.merging.lineage import HISTORY

AGAIN = "again"
"""The folder for a run that is made once more."""


def write(runs: Sequence[tuple[Run, Look]], out: Path) -> list[Path]:
    """Writes the page and the files beside it.

    Args:
        runs: One or more, with what was found out about each.
        out: The HTML file.

    Returns:
        What was written, the page first.
    """
    pages = [_run_page(run, look) for run, look in runs]
    comparison = sections.comparison([run for run, _ in runs]) if len(runs) > 1 else None
    heading = pages[0].title if comparison is None else f"{len(runs)} runs compared"
    beside: dict[str, bytes] = _files("", comparison.pictures) if comparison is not None else {}
    for place, each in enumerate(pages, 1):
        prefix = f"{place}-" if len(pages) > 1 else ""
        if each.tree is not None:
            beside[f"{prefix}tree.svg"] = page.svg(each.tree).encode()
        beside |= _files(prefix, [picture for group in each.groups for picture in group.pictures])
    paths = {out.with_name(f"{out.stem}-{name}"): content for name, content in beside.items()}
    for path, content in paths.items():
        write_bytes(path, content)
    write_text(out, page.html(heading, pages, comparison, here_and_now()))
    return [out, *paths]


def _files(prefix: str, drawn: Sequence[Picture]) -> dict[str, bytes]:
    return {f"{prefix}{picture.name}.png": picture.light for picture in drawn}


def _run_page(run: Run, look: Look) -> RunPage:
    missing = [*run.missing, *look.missing]
    if run.history is None:
        missing.append(f"The family tree: neither {HISTORY} of a student nor a checkpoint says what merged.")
    elif not run.history.steps:
        missing.append("Merges: no layers were merged, the student is as deep as the teacher.")
    if run.log.diverged is not None:
        missing.append(f"The loss from step {run.log.diverged} on: it was no finite number.")
    if undrawn := pictures.missing():
        missing.append(f"The pictures: {undrawn}")
    groups = (
        sections.training(run),
        sections.merges(run),
        sections.evaluated(run),
        sections.layers(run, look),
        sections.similarity(look),
    )
    return RunPage(
        title=title(run),
        facts=_facts(run),
        headlines=headlines(run),
        missing=tuple(missing),
        tree=None if run.history is None else family_tree(run.history),
        groups=groups,
        samples=look.samples,
        recipe=run.recipe_text,
        command=_command(run),
    )


def _facts(run: Run) -> tuple[tuple[str, str], ...]:
    """Where it came from."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    facts = {"run": run.name, "teacher": _public(run.teacher), "finished": run.finished, "with": versions}
    if run.log.series:
        read = run.log.last_step * (run.tokens_per_step or 0)
        steps = f"{run.log.last_step:,} steps"
        facts["trained for"] = f"{steps} on {read:,} tokens" if read else steps
    if run.log.resumes:
        facts["resumed at step"] = ", ".join(map(str, run.log.resumes))
    return tuple((name, value) for name, value in facts.items() if value)


def _public(teacher: str) -> str:
    """A hub name as it is, and of a folder its own name: where it lies is nobody else's business."""
    local = teacher.startswith(("/", "~", "."))
    return short_name(teacher) if local else models.public_name(teacher)


def _command(run: Run) -> str:
    """What makes the run again from its beginning, into another folder; empty without a recipe."""
    recipe = run.folder / RECIPE
    if not recipe.is_file():
        return ""
    if not run.trained:
        words = ["lcprune", "collapse", "--config", str(recipe), "--plan", str(run.folder / HISTORY), "--out", AGAIN]
        return shlex.join(words)
    words = ["lcprune", "fit", "--config", str(recipe), "--trainer.default_root_dir", AGAIN, *_logging(run)]
    # Else the new student would replace the one that is there, and a run that was resumed go on behind its end.
    if run.setting("out") is not None:
        words += ["--out", f"{AGAIN}/{STUDENT}"]
    if run.resumed:
        words += ["--ckpt_path", "null"]
    return shlex.join(words)


def _logging(run: Run) -> list[str]:
    """The recipe's loggers with another folder."""
    loggers = run.setting("trainer", "logger")
    if isinstance(loggers, list):
        moved = [
            {**each, "init_args": {**each["init_args"], "save_dir": AGAIN}} if _saves(each) else each
            for each in loggers
        ]
        return ["--trainer.logger", json.dumps(moved)] if moved != loggers else []
    return ["--trainer.logger.init_args.save_dir", AGAIN] if _saves(loggers) else []


def _saves(logger: object) -> bool:
    settings = logger.get("init_args") if isinstance(logger, Mapping) else None
    return isinstance(settings, Mapping) and "save_dir" in settings
