"""What was merged, in which order, and from which teacher layers every student layer descends.

A `MergeStep` is one merge: a run of consecutive student layers becomes one. A `MergeHistory` is the sequence of them,
starting from the teacher's depth; a plan is the same value before it is executed. The lineage is never stored, it is
derived by replaying the groups:

    depth 6, groups (3, 4) then (1, 2, 3):   0 1 2 3 4 5 -> 0 1 2 [3 4] 5 -> 0 [1 2 3 4] 5
                                             lineage = ((0,), (1, 2, 3, 4), (5,))

Standard library only, so that a plan can be read, edited and checked where torch is not installed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from operator import index as whole
from pathlib import Path
from types import UnionType
from typing import TypeGuard

from lcprune.errors import InputError
from lcprune.files import check_file, path_of, write_text

Lineage = tuple[tuple[int, ...], ...]
"""For every student layer the consecutive teacher layers it descends from, in order; a partition of the teacher."""

FORMAT = 1
"""Version of the JSON form; a reader refuses a newer one."""
HISTORY = "history.json"
"""What the file is called in which an exported student says how it came from its teacher."""
SEAL = "sha256"
"""Where in the JSON of a sealed history its hash is; without it, as in a plan, nothing is compared."""
MOST_LAYERS = 10_000
"""More than any model has; a damaged number must not take the memory of a lineage."""


@dataclass(frozen=True)
class MergeStep:
    """One merge: the student layers of `group` become one layer, in the place of the first.

    Example:
        >>> MergeStep(group=(3, 4), operator={"class_path": "Drop"}, shares=(1.0, 0.0))
    """

    group: tuple[int, ...]
    """Consecutive student layer indices, as they are numbered when this step begins; the first is the base."""
    operator: Mapping[str, object]
    """The operator as `{"class_path": ..., "init_args": {...}}`."""
    shares: tuple[float, ...]
    """Fraction of every member, in the order of `group`; not negative, sums to 1."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What the planner saw: criterion or similarity by name."""
    global_step: int | None = None
    """Optimizer step after which the merge happened; None outside training."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Figures taken right after the merge, by metric name."""
    refit: Mapping[str, object] | None = None
    """The refit that follows this step, as `{"class_path": ..., "init_args": {...}}`; None = none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", whole_numbers("group", self.group))
        object.__setattr__(self, "shares", tuple(_share(share) for share in self.shares))
        for name in ("scores", "measured"):
            object.__setattr__(self, name, _figures(name, getattr(self, name), self.group))
        consecutive = all(right == left + 1 for left, right in zip(self.group, self.group[1:], strict=False))
        if len(self.group) < 2 or not consecutive or self.group[0] < 0:
            raise InputError(
                f"group={list(self.group)} is not a run of two or more consecutive layers from 0 on: "
                "write it like [12, 13, 14]."
            )
        if len(self.shares) != len(self.group) or not (min(self.shares) >= 0 and abs(sum(self.shares) - 1) < 1e-6):
            raise InputError(
                f"shares={list(self.shares)} of group {list(self.group)} must be {len(self.group)} numbers, "
                "none negative, that sum to 1."
            )
        self._check_spec("operator", self.operator)
        if self.refit is not None:
            self._check_spec("refit", self.refit)

    def _check_spec(self, name: str, spec: object) -> None:
        if not isinstance(spec, Mapping):
            raise InputError(
                f"{name}={spec!r} of group {list(self.group)} must be plain data, such as "
                '{"class_path": "Drop", "init_args": {"keep": "first"}}.'
            )
        if not isinstance(spec.get("class_path"), str):
            raise InputError(f"{name}={dict(spec)} of group {list(self.group)} lacks its class_path.")

    @property
    def base(self) -> int:
        """The student layer whose place and parameters the merged layer takes."""
        return self.group[0]

    @property
    def absorbed(self) -> int:
        """How many layers the merge takes away."""
        return len(self.group) - 1

    @property
    def operator_name(self) -> str:
        """The class name of the operator, without its module."""
        return str(self.operator["class_path"]).rpartition(".")[2]

    @property
    def refit_name(self) -> str | None:
        """The class name of the refit, without its module; None = none."""
        return None if self.refit is None else str(self.refit["class_path"]).rpartition(".")[2]


@dataclass(frozen=True)
class MergeHistory:
    """The merges that led from a teacher of `teacher_depth` layers to the student, oldest first."""

    teacher_depth: int
    """Number of decoder layers of the original model."""
    steps: tuple[MergeStep, ...] = ()
    """The merges in the order in which they happened (or will happen, for a plan)."""
    teacher: str = ""
    """Name or path of the original model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not 1 <= self.teacher_depth <= MOST_LAYERS:
            raise InputError(f"teacher_depth={self.teacher_depth} must lie between 1 and {MOST_LAYERS}.")
        depth = self.teacher_depth
        for step in self.steps:
            if not isinstance(step, MergeStep):
                raise InputError(f"steps: {step!r} is no MergeStep: write MergeStep(group, operator, shares).")
            if step.group[-1] >= depth:
                raise InputError(
                    f"group={list(step.group)} reaches past the last layer {depth - 1}: groups are numbered "
                    "as the layers stand when their merge begins, after the merges before it."
                )
            depth -= step.absorbed

    @property
    def depth(self) -> int:
        """Number of layers after all steps."""
        return self.teacher_depth - sum(step.absorbed for step in self.steps)

    @property
    def lineage(self) -> Lineage:
        """Teacher layers of every student layer, in order."""
        layers: list[tuple[int, ...]] = [(index,) for index in range(self.teacher_depth)]
        for step in self.steps:
            merged = tuple(member for index in step.group for member in layers[index])
            layers[step.group[0] : step.group[-1] + 1] = [merged]
        return tuple(layers)

    @property
    def digest(self) -> str:
        """Hash of what was merged how; equal on all ranks, or they have diverged."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def append(self, step: MergeStep) -> "MergeHistory":
        """This history with one more step; raises InputError if the step does not fit the depth."""
        return replace(self, steps=(*self.steps, step))

    def extend(self, steps: Iterable[MergeStep]) -> "MergeHistory":
        """This history with several more steps."""
        return replace(self, steps=(*self.steps, *steps))

    def after(self, done: "MergeHistory") -> "MergeHistory | None":
        """What this history goes on with after another one; None if it did not begin with the same merges.

        Example:
            >>> whole.after(whole).steps
            ()
        """
        number = len(done.steps)
        begun = replace(self, steps=self.steps[:number])
        if begun.teacher_depth != done.teacher_depth or begun.lineage != done.lineage:
            return None
        return replace(self, teacher_depth=done.depth, steps=self.steps[number:])

    def of_before(self) -> "MergeHistory":
        """This history as that of a student that a new run begins with: no merge is that run's own."""
        return replace(self, steps=tuple(replace(step, global_step=None) for step in self.steps))

    def to_dict(self) -> dict[str, object]:
        """Plain lists, dicts, strings and numbers."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "MergeHistory":
        """The history written by `to_dict`; raises InputError naming the field that does not fit."""
        return _parse(data)

    def to_json(self) -> str:
        """Stable, indented JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def sealed(self) -> str:
        """The JSON with a hash of everything in it, for an account that nobody is meant to edit."""
        content = {**self.to_dict(), SEAL: self.digest}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "MergeHistory":
        """The history written by `to_json` or `sealed`; raises InputError for another text, or one that was changed."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of thousands of digits
            raise InputError(f"This plan or history is not JSON ({error}).") from error
        return _parse(data)

    def save(self, path: Path | str) -> None:
        """Writes it as a plan, which may be edited; raises InputError if the file cannot be written."""
        path = path_of("path", path)
        check_file("path", path)
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> "MergeHistory":
        """Reads a plan or history file; raises InputError naming the file."""
        path = path_of("path", path)
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"The plan or history file {path} cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: This plan or history is not JSON in UTF-8 ({error.reason}).") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def whole_numbers(name: str, given: Iterable[object]) -> tuple[int, ...]:
    """Layers as plain whole numbers, whatever library they come from; raises InputError for anything else."""
    try:
        return tuple(whole(layer) for layer in given)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"{name}={given!r} must be layer numbers like [12, 13, 14].") from error


def _share(value: float) -> float:
    return float(value) if abs(value) <= 1 else float("nan")  # which no sum makes right; larger ones may be no floats


def _figures(name: str, given: Mapping[str, float], group: tuple[int, ...]) -> dict[str, float]:
    """Plain numbers, whatever library they come from; whole ones of Python stay as they are, and so does a seal."""
    try:
        return {key: value if type(value) is int else float(value) for key, value in given.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of several numbers
        raise InputError(f"{name}={given!r} of group {list(group)} must hold numbers by name.") from error


def _parse(data: object) -> MergeHistory:
    if not isinstance(data, Mapping):
        raise InputError(f"A plan or history is a JSON object, not {type(data).__name__}.")
    known = ("format", "teacher", "teacher_depth", "steps", SEAL)
    wrong = [key for key in data if key not in known]
    if wrong:
        raise InputError(f"A plan or history has the unknown key {wrong[0]!r}; known are {', '.join(known)}.")
    version = data.get("format")
    if version != FORMAT or isinstance(version, bool):
        raise InputError(f"format={version!r} of this plan or history is not {FORMAT}, the one this version reads.")
    depth = data.get("teacher_depth")
    if not _is_whole(depth):
        raise InputError(f"teacher_depth={depth!r} must be a whole number of layers.")
    teacher = data.get("teacher", "")
    if not isinstance(teacher, str) or not _is_text(teacher):
        raise InputError(f"teacher={teacher!r} must be the name of a model.")
    steps = data.get("steps", ())
    if not isinstance(steps, list | tuple):
        raise InputError(f"steps={steps!r} must be a list of merge steps.")
    history = MergeHistory(depth, tuple(_parse_step(index, step) for index, step in enumerate(steps)), teacher)
    if data.get(SEAL, history.digest) != history.digest:
        raise InputError(
            f"This history is not as it was written ({SEAL} differs): take it from a whole export, or delete the entry "
            f"{SEAL!r} if you have edited it on purpose."
        )
    return history


def _parse_step(index: int, data: object) -> MergeStep:
    if not isinstance(data, Mapping):
        raise InputError(f"steps[{index}] is a JSON object, not {type(data).__name__}.")
    known = set(MergeStep.__dataclass_fields__)
    wrong = [key for key in data if key not in known]
    if wrong:
        raise InputError(f"steps[{index}] has the unknown key {wrong[0]!r}; known are {', '.join(sorted(known))}.")
    group, shares = data.get("group"), data.get("shares")
    operator, scores, measured = data.get("operator"), data.get("scores", {}), data.get("measured", {})
    global_step, refit = data.get("global_step"), data.get("refit")
    if not _is_list_of(group, int):
        raise InputError(f"steps[{index}].group={group!r} must be a list of layer numbers.")
    if shares is None and isinstance(group, list | tuple) and group:
        shares = [1 / len(group)] * len(group)
    if not _is_list_of(shares, int | float):
        raise InputError(f"steps[{index}].shares={shares!r} must be a list of numbers.")
    for name, value in (("operator", operator), ("scores", scores), ("measured", measured)):
        if not isinstance(value, Mapping):
            raise InputError(f"steps[{index}].{name}={value!r} must be an object.")
        if name != "operator" and not _is_list_of(list(value.values()), int | float):
            raise InputError(f"steps[{index}].{name}={dict(value)} must hold numbers by name.")
    if refit is not None and not isinstance(refit, Mapping):
        raise InputError(f"steps[{index}].refit={refit!r} must be an object or null.")
    if global_step is not None and not (_is_whole(global_step) and global_step >= 0):
        raise InputError(f"steps[{index}].global_step={global_step!r} must be a whole number or null.")
    return MergeStep(tuple(group), operator, tuple(shares), scores, global_step, measured, refit)  # type: ignore[arg-type]


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: str) -> bool:
    """Whether it can be written down: JSON can spell halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _is_list_of(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )
