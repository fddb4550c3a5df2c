"""What `evaluate` and `export` are pointed at: a run folder, a model's folder, or a name; looked over without weights.

runs/x            recipe.yaml, student/ (or out: of the recipe) with history.json    evaluation.json goes into it
short/            config.json, perhaps history.json, recipe.yaml               into it
demo:smollm2, owner/name                                       into the current folder
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import PretrainedConfig

from lcprune import models, weights
from lcprune.delivery.export import RECIPE
from lcprune.delivery.runs import student_of, unfinished
from lcprune.errors import InputError
from lcprune.merging.architectures import layout_of
from lcprune.merging.lineage import HISTORY, MergeHistory


@dataclass(frozen=True)
class Subject:
    """A model and what lies around it."""

    name: str
    """As it was typed."""
    model: str
    """What can be loaded: a folder, a hub name or demo:smollm2."""
    home: Path
    """Where figures about it belong."""
    recipe: Path | None
    """The recipe that made it."""
    history: MergeHistory | None
    """How it came from its teacher."""
    config: PretrainedConfig
    """The model's."""

    @property
    def teacher(self) -> str | None:
        """The model that it descends from, by its history; None = it says none.

        The recipe knows a teacher that goes by another name elsewhere, as the demo model does.
        """
        told = None if self.history is None else self.history.teacher or None
        named = None if self.recipe is None else _teacher_in(self.recipe)
        return named if named is not None and told in (None, models.public_name(named)) and self.history else told

    def check_teacher(self, teacher: str) -> None:
        """Raises InputError for a teacher that this model cannot be compared with."""
        config = models.read_config(teacher)
        depth = layout_of(config).depth_of(config)
        if self.history is not None and self.history.teacher_depth != depth:
            raise InputError(
                f"{teacher} has {depth} layers, {self.name} descends from a model of {self.history.teacher_depth}: "
                "name that one with --teacher."
            )
        mine, theirs = (each.get_text_config().vocab_size for each in (self.config, config))
        if mine != theirs:
            raise InputError(
                f"{teacher} has a vocabulary of {theirs}, {self.name} one of {mine}: name the model that it descends "
                "from with --teacher."
            )


def look_at(name: str) -> Subject:
    """What lies at a name.

    Raises:
        InputError: There is no model, or its history is not that of its config.
    """
    place = Path(name).expanduser()
    run = place.is_dir() and not (place / "config.json").is_file()
    folder = (student_of(place) if run else None) or place
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        if way := unfinished(place):
            raise InputError(f"{name} is a run that has exported no student yet: {way}.")
        raise InputError(
            f"{name} holds neither a model (config.json) nor a run with one (student/config.json): name a folder that "
            "lcprune fit, collapse or export wrote, or a model on the hub."
        )
    model = str(folder) if local else name
    config = weights.config_of(model)
    depth = layout_of(config).depth_of(config)
    history = MergeHistory.load(folder / HISTORY) if local and (folder / HISTORY).is_file() else None
    if history is not None and history.depth != depth:
        raise InputError(f"{name} has {depth} layers, its {HISTORY} says {history.depth}: export it anew.")
    recipes = [at / RECIPE for at in (place, folder) if local and (at / RECIPE).is_file()]
    return Subject(name, model, place if local else Path(), next(iter(recipes), None), history, config)


def _teacher_in(recipe: Path) -> str | None:
    """The model.teacher of a recipe as it is written; None where it says none."""
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The recipe {recipe} cannot be read ({' '.join(str(error).split())}).") from error
    section = content.get("model") if isinstance(content, dict) else None
    teacher = section.get("teacher") if isinstance(section, dict) else None
    return teacher if isinstance(teacher, str) else None
