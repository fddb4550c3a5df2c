"""From the parts of a report to one HTML file: the templates, in which every text is escaped, and what they may show.

`templates/report.html` is the page, `templates/tree.svg` the family tree, inside the page or alone. Everything that
comes from data (names, recipes, generated text) goes through Jinja with its escaping on; pictures are data URIs, so
that the page needs no second file and no network.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lcprune.delivery.provenance import Provenance
from lcprune.delivery.samples import Sample
from lcprune.delivery.tree import Tree

ROOMY, DENSE, MANY = 18, 14, 40
"""Pixels per teacher layer in the tree: of a model with few layers, and of one with more than `MANY`."""


@dataclass(frozen=True)
class Picture:
    """A PNG in both themes."""

    name: str
    """What its file is called, without suffix: one of ours, never out of data."""
    title: str
    """What is to be seen, for those who do not see it."""
    light: bytes
    """On white, and on paper."""
    dark: bytes
    """On black."""

    @property
    def light_uri(self) -> str:
        """As a data URI."""
        return _data_uri(self.light)

    @property
    def dark_uri(self) -> str:
        """As a data URI."""
        return _data_uri(self.dark)


@dataclass(frozen=True)
class Headline:
    """A figure that the page begins with."""

    label: str
    """What it is about."""
    value: str
    """The figure."""
    note: str
    """What it is to be compared with."""


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is left, the others are figures on the right."""

    head: tuple[str, ...]
    """A heading per column."""
    rows: tuple[tuple[str, ...], ...]
    """As many cells each."""
    note: str = ""
    """What to know about it."""


@dataclass(frozen=True)
class Group:
    """Pictures and tables that belong together, under a heading; nothing is shown of an empty one."""

    title: str
    """The heading."""
    note: str
    """A sentence or two below it."""
    pictures: tuple[Picture, ...] = ()
    """Two beside each other; a single one has the tables beside it."""
    tables: tuple[Table, ...] = ()
    """Below the pictures."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.pictures or self.tables)


@dataclass(frozen=True)
class RunPage:
    """All that is shown of one run."""

    title: str
    """The model and its depth before and after."""
    facts: tuple[tuple[str, str], ...]
    """Name and value: which run, when, with what."""
    headlines: tuple[Headline, ...]
    """The figures that matter most."""
    missing: tuple[str, ...]
    """A sentence for each thing that is not there."""
    tree: Tree | None
    """None = no history is known."""
    groups: tuple[Group, ...]
    """In order."""
    samples: tuple[Sample, ...]
    """Generated text."""
    recipe: str
    """Its text; empty if there is none."""
    command: str
    """What makes the run again; empty if nothing is known to."""

    @property
    def pitch(self) -> int:
        """Pixels per row of the tree."""
        return DENSE if self.tree is not None and self.tree.teacher_depth > MANY else ROOMY


def html(title: str, runs: Sequence[RunPage], comparison: Group | None, made: Provenance) -> str:
    """The page.

    Args:
        title: Of the window.
        runs: One or more.
        comparison: Of several runs.
        made: When and where.
    """
    template = _environment().get_template("report.html")
    return template.render(title=title, runs=runs, comparison=comparison, made=made, width="100%")


def svg(tree: Tree, *, width: int = 720) -> str:
    """The tree alone, for a README or a slide."""
    pitch = DENSE if tree.teacher_depth > MANY else ROOMY
    return _environment().get_template("tree.svg").render(tree=tree, pitch=pitch, width=width)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
