"""What a recipe may name: classes of the families that it has places for, and nothing else that Python can import.

    model.lr_scheduler: {class_path: RewarmingCosine, ...}        a class of a family: made
    model.lr_scheduler: {class_path: os.system, init_args: ...}   refused, before anything of the recipe is made

jsonargparse compares a class with the type that a place has. Where that type is a callable or says nothing it also
takes functions, and calls them with the recipe's arguments. To look a name up is to import its module, that much cannot
be refused: it is how classes of the user's own are found.
"""

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from inspect import isabstract
from pkgutil import resolve_name

from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lcprune
from lcprune.distillation.levels import Level
from lcprune.distillation.schedules import Schedule
from lcprune.errors import InputError
from lcprune.merging.criteria import Criterion
from lcprune.merging.operators import Operator
from lcprune.merging.planners import Planner
from lcprune.merging.refit import Refit

KINDS: tuple[type, ...] = (Schedule, Planner, Criterion, Operator, Refit, Level)
"""Ours, of which a recipe names a class that is not abstract."""
FAMILIES: tuple[type, ...] = (
    *KINDS,
    *(Optimizer, LRScheduler, LightningDataModule),
    *(Callback, Logger, Profiler, Strategy, Accelerator, Precision, LayerSync, CheckpointIO, ClusterEnvironment),
)
"""Ours, torch's and Lightning's; any dataclass goes as well, for it only holds what it is given."""
_FILES = ("config", "__path__")  # where jsonargparse keeps the files it has read: paths, which can be called


def check(settings: object, key: str = "") -> None:
    """Looks at every name in a parsed recipe; makes and calls nothing.

    Args:
        settings: The recipe as jsonargparse has parsed it, or a part of it.
        key: The dotted name of that part.

    Raises:
        InputError: A name is of a function, or of a class that is none of the families'.
    """
    for name, value in _parts(settings):
        where = f"{key}.{name}".lstrip(".")
        if name == "class_path" and isinstance(value, str):
            _check_class(key, value)
        elif callable(value) and not isinstance(value, type | Namespace):
            raise _refused(where, getattr(value, "__qualname__", repr(value)))
        else:
            check(value, where.removesuffix(".init_args"))


def _parts(settings: object) -> Iterator[tuple[str, object]]:
    if isinstance(settings, Namespace):
        yield from ((name, value) for name, value in vars(settings).items() if name not in _FILES)
    elif isinstance(settings, Mapping):
        yield from ((str(name), value) for name, value in settings.items())
    elif isinstance(settings, list | tuple):
        yield from ((str(place), value) for place, value in enumerate(settings))


def _check_class(key: str, path: str) -> None:
    try:
        named = resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        raise _refused(key, path) from None
    if not isinstance(named, type) or not (issubclass(named, FAMILIES) or is_dataclass(named)):
        raise _refused(key, path)
    if isabstract(named) and (sentence := nameless(key, path)):
        raise InputError(sentence)


def nameless(key: str, name: str) -> str | None:
    """What to say of a setting that names an abstract class: those that would do; None = it is no kind of ours.

    Args:
        key: The setting.
        name: The class, with or without its package.
    """
    ours = [one for one in (getattr(lcprune, name) for name in lcprune.__all__) if isinstance(one, type)]
    for kind in KINDS:
        if name.rpartition(".")[2] in (one.__name__ for one in _family(kind)):
            classes = sorted(one.__name__ for one in ours if issubclass(one, kind) and not isabstract(one))
            return f"{key} names no class: give one of {', '.join(classes)}."
    return None


def _family(kind: type) -> Iterator[type]:
    subclasses: list[type] = kind.__subclasses__()
    yield kind
    for one in subclasses:
        yield from _family(one)


def _refused(key: str, name: str) -> InputError:
    return InputError(
        f"{key}={name} is not a class that a recipe may name: give one of lcprune's, an optimizer or scheduler of "
        "torch's kind, or what Lightning's Trainer takes (callback, logger, profiler, strategy, plugin), never a "
        "function."
    )
