"""A null in a recipe where a setting takes none: jsonargparse lets it through from a file, and code meets it later."""

from argparse import Action
from collections.abc import Iterable, Mapping
from typing import Literal, get_args, get_origin

from lcprune.cli.messages import plain
from lcprune.errors import InputError

OURS = ("data.", "model.")
"""Sections whose settings are looked at; Lightning looks at its own."""


def check(actions: Iterable[Action], settings: Mapping[str, object]) -> None:
    """Raises InputError for the first such null.

    Args:
        actions: Of the parser: what settings there are, and their types.
        settings: A parsed recipe, by dotted name.
    """
    for action in actions:
        hint = getattr(action, "_typehint", None)
        if not action.dest.startswith(OURS) or not (isinstance(hint, type) or get_origin(hint) is Literal):
            continue
        if type(None) not in get_args(hint) and settings.get(action.dest, action.default) is None:
            raise InputError(f"{action.dest}=null must be {plain(str(hint))}, or left out for {action.default!r}.")
