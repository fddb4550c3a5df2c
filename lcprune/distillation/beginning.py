"""A student that does not begin as the teacher but where an earlier run or `lcprune collapse` has left it.

history.json in its folder      the lineage: which teacher layers every layer came from
config, safetensors             the weights; those equal to the teacher's stay one copy with them
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PretrainedConfig, PreTrainedModel

from lcprune import models
from lcprune.distillation.fingerprint import DEPTH, differences, fingerprint_of
from lcprune.distillation.teacher import DtypeName, load
from lcprune.distillation.trained import ids_behind
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.lineage import HISTORY, MergeHistory


@dataclass(frozen=True)
class Reference:
    """What a merged student is repaired towards."""

    model: PreTrainedModel
    """A model that the student descends from."""
    history: MergeHistory
    """The merges that led from it to the student as it stands."""


def history_of(folder: Path, teacher: str, original: PretrainedConfig) -> MergeHistory:
    """How the student in a folder came from the teacher; nothing in it counts as done in this run.

    Args:
        folder: As `lcprune collapse`, `fit` or `export` wrote it.
        teacher: The teacher's name.
        original: The teacher's config.

    Raises:
        InputError: If the folder is none of those, its account does not fit its own config, or its teacher is another.
    """
    if not (folder / HISTORY).is_file():
        raise InputError(
            f"model.student={str(folder)!r} holds no {HISTORY}: name a folder that lcprune collapse, fit or export "
            "wrote, or leave model.student out to begin from the teacher."
        )
    if not [*folder.glob("*.safetensors")]:
        raise InputError(
            f"model.student={str(folder)!r} holds no weights (*.safetensors): it is not whole, export anew."
        )
    history = MergeHistory.load(folder / HISTORY)
    named = models.public_name(teacher)
    another = bool(history.teacher) and not _same_model(history.teacher, named)
    if another and not _beyond_comparison(history.teacher, named):
        raise InputError(
            f"model.student={str(folder)!r} descends from {history.teacher!r}, model.teacher is {teacher!r}: name that "
            f"teacher, or if they are the same model, delete 'teacher' and 'sha256' in the student's {HISTORY}."
        )
    config = models.read_config(str(folder))
    layers = layout_of(config).depth_of(config)
    if layers != history.depth:
        raise InputError(f"model.student={str(folder)!r} has {layers} layers, its {HISTORY} says {history.depth}.")
    depth = layout_of(original).depth_of(original)
    if depth != history.teacher_depth:
        raise InputError(
            f"model.student={str(folder)!r} descends from a model of {history.teacher_depth} layers, "
            f"model.teacher={teacher!r} has {depth}: name the one it was shortened from."
        )
    if found := differences(fingerprint_of(config), fingerprint_of(original), passing=(DEPTH,)):
        raise InputError(
            f"model.student={str(folder)!r} descends from a model of another shape ({found[0]}) than "
            f"model.teacher={teacher!r} ({found[1]}): name the one it was shortened from."
        )
    if another:
        rank_zero_warn(
            f"model.student={str(folder)!r} descends from {history.teacher!r}, which is not here: "
            f"model.teacher={teacher!r} is taken for the same model"
        )
    steps = tuple(replace(step, global_step=None) for step in history.steps)
    return replace(history, steps=steps, teacher=teacher)


def _same_model(one: str, other: str) -> bool:
    """Whether two names, of folders or on the hub, mean the same."""
    folders = Path(one).expanduser(), Path(other).expanduser()
    return one == other or (all(map(Path.is_dir, folders)) and folders[0].resolve() == folders[1].resolve())


def _beyond_comparison(recorded: str, named: str) -> bool:
    """Whether names say nothing: the recorded folder is on another machine, or a hub's model is in a folder here."""
    there, here = Path(recorded).expanduser(), Path(named).expanduser()
    return not there.is_dir() and (there.is_absolute() or here.is_dir())


def take_over(student: PreTrainedModel, folder: Path, history: MergeHistory, dtype: DtypeName) -> bool:
    """Gives a view of the teacher the structure and the weights of the student in a folder, in place.

    Args:
        student: Nothing has happened to it; its tensors may be the teacher's, and are not written to.
        folder: The student's.
        history: The student's.
        dtype: Type of the student's weights.

    Returns:
        Whether everything before the first merged layer is as it was.
    """
    surgery.replay(student, history)
    stored = dict(load(str(folder), dtype, student.device, named="model.student").named_parameters())
    behind = ids_behind(student, history.lineage)
    untouched = True
    for name, parameter in student.named_parameters():
        if not torch.equal(parameter, stored[name]):
            parameter.data = stored[name].data
            untouched &= id(parameter) in behind
    return untouched
