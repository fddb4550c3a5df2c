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
"""Gets what is done, how many items are finished, and of how many (None = not known; equal = over)."""

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

    The last report says that all are done even if the loop was left before, so that nobody waits for the rest.

    Args:
        items: What is worked through.
        what: Short description, e.g. "scoring layers".
        total: How many there are, or how many at most; default: `len(items)` where it has one.
    """
    reporter = _reporter.get()
    if reporter is None:
        yield from items
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    done = 0
    reporter(what, done, total)
    try:
        for item in items:
            yield item
            done += 1
            reporter(what, done, total)
    finally:
        if done != total:
            reporter(what, done, done)
