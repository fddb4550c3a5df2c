"""Operators and refits as plain data, which is how a plan names them: `{"class_path": ..., "init_args": {...}}`.

A plan is data from outside. It can name only classes of lcprune, by their bare names too, and of modules that the
program has imported by itself: nothing is imported because a plan says so.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from inspect import isabstract
from typing import TypeVar

from lcprune.errors import InputError

Member = TypeVar("Member")


def check_nameable(family: type[Member], member: Member) -> None:
    """Refuses an object of a class that no plan can name.

    Args:
        family: `Operator` or `Refit`.
        member: One of the family.

    Raises:
        InputError: The class is no dataclass, or is defined inside a function or a class.
    """
    kind, word = type(member), family.__name__.lower()
    if not is_dataclass(kind):
        raise InputError(
            f"{word} {kind.__name__} is no dataclass, so that a plan cannot hold its arguments: put "
            "@dataclass(frozen=True) above the class."
        )
    if "." in kind.__qualname__:
        raise InputError(
            f"{word} {kind.__qualname__} is defined inside a function or a class, where a plan cannot find it by name: "
            "define it at the top of a module."
        )


def spec_of(family: type[Member], member: Member) -> dict[str, object]:
    """An operator or refit as plain data; raises InputError as `check_nameable` does."""
    check_nameable(family, member)
    kind = type(member)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": asdict(member)}  # type: ignore[call-overload]


def from_spec(family: type[Member], spec: Mapping[str, object]) -> Member:
    """The operator or refit that `spec_of` described; a bare class name means one of lcprune's.

    Args:
        family: `Operator` or `Refit`.
        spec: As a plan holds it.

    Raises:
        InputError: The class is none of the family or not imported, or does not take the arguments.
    """
    word, class_path, init_args = family.__name__.lower(), str(spec.get("class_path")), spec.get("init_args") or {}
    beside = next((key for key in spec if key not in ("class_path", "init_args")), None)
    if beside is not None:
        raise InputError(
            f"{word} class_path={class_path!r} has {beside!r} beside it, where nothing reads it: put it under "
            "init_args."
        )
    kind = _kind(family, class_path)
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    unknown = [key for key in (init_args if isinstance(init_args, Mapping) else ["init_args"]) if key not in known]
    if unknown:
        raise InputError(
            f"{word} {kind.__name__} does not take {unknown[0]!r}; its arguments are: {', '.join(known) or 'none'}."
        )
    return kind(**init_args)  # type: ignore[arg-type]


def _kind(family: type[Member], class_path: str) -> type[Member]:
    """The class of that name; raises InputError for one that is not there, not of the family or no dataclass."""
    module, _, name = class_path.rpartition(".")
    ours = {sub.__name__: sub for sub in family.__subclasses__() if sub.__module__.startswith("lcprune.")}
    kind = ours.get(name) if module in ("", "lcprune") else getattr(sys.modules.get(module), name, None)
    if is_dataclass(kind) and isinstance(kind, type) and issubclass(kind, family) and not isabstract(kind):
        return kind
    word = family.__name__.lower()
    foreign = module not in sys.modules and all(map(str.isidentifier, module.split(".")))
    way = f"; if it is your own, import {module} before this plan is executed" if foreign else ""
    raise InputError(
        f"{word} class_path={class_path!r} is not {'an' if word[0] in 'aeiou' else 'a'} {word}; known are "
        f"{', '.join(sorted(ours))}{way}."
    )
