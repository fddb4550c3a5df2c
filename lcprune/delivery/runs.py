"""What a folder says about a run: recipe, history, figures, metrics; what is not there is named, not missed.

    RUN/recipe.yaml  figures.json  metrics.csv  metrics.1.csv ...  evaluation.json  checkpoints/
    RUN/student/     a Hugging Face folder with history.json and recipe.yaml

A folder that `lcprune collapse` or `export` wrote is read too: it is its own student, and was not trained here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

import yaml

from lcprune.delivery import training_log
from lcprune.delivery.export import RECIPE
from lcprune.delivery.figures import Figures, ModelFigures
from lcprune.delivery.training_log import METRICS, TrainingLog
from lcprune.errors import InputError
from lcprune.merging.lineage import HISTORY, MergeHistory

FIGURES, EVALUATION, STUDENT, CHECKPOINTS = "figures.json", "evaluation.json", "student", "checkpoints"
TEMPLATE = "chat_template.jinja"
"""What data.chat_template said when the run began."""


@dataclass(frozen=True)
class Run:
    """Everything on disk about one run."""

    folder: Path
    """The run's, or that of an exported student."""
    recipe_text: str = ""
    """The resolved recipe as it was saved; empty if it is missing."""
    recipe: Mapping[str, object] | None = None
    """The same, read."""
    history: MergeHistory | None = None
    """How the student came from the teacher."""
    figures: Figures | None = None
    """Sizes, speeds and validation of a run that has ended."""
    evaluation: Mapping[str, object] | None = None
    """What `lcprune evaluate` wrote."""
    log: TrainingLog = field(default_factory=TrainingLog)
    """The metrics; empty if there are none."""
    student: Path | None = None
    """Folder of the exported student with its weights."""
    missing: tuple[str, ...] = ()
    """A sentence for each thing that is not there."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def teacher(self) -> str:
        """What the recipe, else the history calls the original; empty if neither does."""
        named = self.setting("model", "teacher")
        return named if isinstance(named, str) else self.history.teacher if self.history else ""

    @property
    def trained(self) -> bool:
        """Whether `lcprune fit` made it, whose recipes name a checkpoint or none, also in an exported student."""
        exported = (self.folder / HISTORY).is_file()
        return not exported or (self.recipe is not None and "ckpt_path" in self.recipe)

    @property
    def resumed(self) -> bool:
        """Whether the run went on from a checkpoint of its own, and not from one that another command wrote."""
        path = self.setting("ckpt_path")
        if not isinstance(path, str) or path in ("last", "best", "hpc"):
            return path is not None
        saved = self.setting("trainer", "logger", "init_args", "save_dir")
        folders = [self.folder, self.setting("trainer", "default_root_dir"), saved]
        own = [Path(folder).resolve() / CHECKPOINTS for folder in folders if isinstance(folder, str | Path)]
        return Path(path).resolve().parent in own

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens that an optimizer step reads; None if the recipe leaves that to the machine."""
        counts = [self.setting("data", "block_size"), self.setting("data", "batch_size")]
        counts += [self.setting("trainer", "accumulate_grad_batches"), self.setting("trainer", "num_nodes")]
        counts.append(self._devices)
        known = [count for count in counts if isinstance(count, int) and count > 0]
        return prod(known) if len(known) == len(counts) else None

    @property
    def finished(self) -> str:
        """When the figures, else the student's history were written; empty if neither was."""
        paths = [self.folder / FIGURES, self.folder / STUDENT / HISTORY, self.folder / HISTORY]
        there = next((path for path in paths if path.is_file()), None)
        return "" if there is None else datetime.fromtimestamp(there.stat().st_mtime).strftime("%Y-%m-%d %H:%M")

    @property
    def versions(self) -> dict[str, str]:
        """Package -> version, as the head of the recipe and the student's config have them."""
        found = dict(re.findall(r"^# ([\w.-]+)==(\S+)$", self.recipe_text, re.MULTILINE))
        if self.student is not None:
            config = _json(self.student / "config.json")
            if isinstance(config, Mapping) and isinstance(config.get("transformers_version"), str):
                found["transformers"] = config["transformers_version"]
        return found

    def setting(self, *keys: str) -> object:
        """A setting of the recipe by its path; None if it has none."""
        value: object = self.recipe
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def _devices(self) -> int | None:
        devices = self.setting("trainer", "devices")
        if isinstance(devices, list):
            return len(devices)
        if isinstance(devices, str) and devices.isdecimal():
            return int(devices)
        if devices == "auto" and self.setting("trainer", "accelerator") == "cpu":
            return 1
        return devices if isinstance(devices, int) else None


def read(folder: Path) -> Run:
    """Reads a run folder, or an exported student's.

    Raises:
        InputError: If the folder is neither.
    """
    if not folder.is_dir() or not any((folder / name).is_file() for name in (RECIPE, FIGURES, METRICS, HISTORY)):
        raise InputError(
            f"{folder} is no run: name a folder that lcprune fit (with {RECIPE}, {METRICS}, {FIGURES}) or lcprune "
            f"collapse (with {HISTORY}) wrote."
        )
    missing: list[str] = []
    text, recipe = _recipe(folder, missing)
    student = _student(folder, recipe)
    figures = _figures(folder, missing)
    log = _log(folder, missing)
    return Run(
        folder=folder,
        recipe_text=text,
        recipe=recipe,
        history=_history(folder, student, figures, missing),
        figures=figures,
        evaluation=_evaluation(folder, student),
        log=log,
        student=student if student is not None and any(student.glob("*.safetensors")) else None,
        missing=tuple(missing),
    )


def student_of(folder: Path) -> Path | None:
    """Where the student of a run is: inside, or where the run's recipe has exported it to; None if it is nowhere."""
    return _student(folder, _recipe(folder, [])[1])


def unfinished(folder: Path) -> str | None:
    """How a run comes by the student that it has not exported; None where it has no checkpoint either."""
    path = newest_checkpoint(folder)
    return (
        None if path is None else f"`lcprune export {path} --out {folder / STUDENT}` makes it of the newest checkpoint"
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run wrote last; None if it wrote none."""
    return max((folder / CHECKPOINTS).glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def _json(path: Path) -> Any:
    """What a file holds; None if there is no such file or it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _recipe(folder: Path, missing: list[str]) -> tuple[str, Mapping[str, object] | None]:
    path = next((path for path in (folder / RECIPE, folder / STUDENT / RECIPE) if path.is_file()), None)
    if path is None:
        missing.append(f"The recipe: there is no {RECIPE}.")
        return "", None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        recipe = None
    if not isinstance(recipe, Mapping):
        missing.append(f"What the recipe says: {RECIPE} is not a YAML mapping.")
        return text, None
    return text, recipe


def _student(folder: Path, recipe: Mapping[str, object] | None) -> Path | None:
    """Where the export is: inside, elsewhere by `out` of the recipe, or the folder itself."""
    elsewhere = recipe.get("out") if recipe is not None else None
    candidates = [folder, folder / STUDENT, *([Path(elsewhere)] if isinstance(elsewhere, str) else [])]
    return next((path for path in candidates if (path / HISTORY).is_file() and (path / "config.json").is_file()), None)


def _figures(folder: Path, missing: list[str]) -> Figures | None:
    path = folder / FIGURES
    if not path.is_file():
        missing.append(f"Sizes and speeds: there is no {FIGURES}, which lcprune fit writes when it ends.")
        return None
    data = _json(path)
    try:
        return Figures(
            teacher=ModelFigures(**data["teacher"]),
            student=ModelFigures(**data["student"]),
            speed={name: float(data["speed"][name]) for name in ("teacher", "student") if data["speed"]},
            history=MergeHistory.from_dict(data["history"]),
            final={name: float(value) for name, value in data["final"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing.append(f"Sizes and speeds: {FIGURES} is not what lcprune fit writes ({type(error).__name__}).")
        return None


def _log(folder: Path, missing: list[str]) -> TrainingLog:
    try:
        log = training_log.read(folder)
    except InputError as error:
        missing.append(f"The course of training: {error}")
        return TrainingLog()
    if not log.series:
        missing.append(
            f"The course of training: no metrics in {METRICS} (lightning.pytorch.loggers.CSVLogger writes them)."
        )
    return log


def _history(folder: Path, student: Path | None, figures: Figures | None, missing: list[str]) -> MergeHistory | None:
    """The export's, which names the teacher; else that of the figures."""
    path = (student or folder) / HISTORY
    try:
        if path.is_file():
            return MergeHistory.load(path)
    except InputError as error:
        missing.append(f"The history of the export: {error}")
    return figures.history if figures is not None else None


def _evaluation(folder: Path, student: Path | None) -> Mapping[str, object] | None:
    folders = [folder, *([student] if student is not None else [])]
    found = (_json(path / EVALUATION) for path in folders)
    return next((data for data in found if isinstance(data, Mapping)), None)
