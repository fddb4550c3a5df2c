"""How far a long computation has come, for whoever wants to show it.

for layer in track(layers, "scoring layers"):        # in the computation
    ...
with reporting(show):                                # around it: show("scoring layers", 3, 30) after each item
    ...
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Reporter = Callable[[str, int, int | None], None]
"""Gets what is done, how many items are finished, and of how many (None = not known)."""

_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Sends the progress of every `track` inside the block to `reporter`."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items, reported one by one as they are finished.

    Args:
        items: What is worked through.
        what: Short description, e.g. "scoring layers".
        total: How many there are; default: `len(items)` where it has one.
    """
    reporter = _reporter.get()
    total = len(items) if total is None and isinstance(items, Sized) else total
    if reporter is not None:
        reporter(what, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        if reporter is not None:
            reporter(what, done, total)
