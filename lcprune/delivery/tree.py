"""The family tree of layers, a drawing without ink: which teacher layers every student layer descends from, and when.

    teacher    step 0   step 8    student
       0 ----------------------------- 0
       1 ------+
               o---------------------- 1      one column per stage; a merged layer lies in the middle of its ancestors
       2 - - - +                              dashed: a layer whose weights the operator left out
       3 ----------------+
                         o------------ 2
       4 ----------------+

A stage is what merged at one optimizer step (or outside training); where a merge takes up a layer that was merged in
the same stage, the stage has a column more. Rows are numbers, columns are fractions of the width, so that the template
`tree.svg` fills whatever width there is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, ReplaceWithLast, from_spec

SCALE = ("#0072B2", "#8A63B8", "#C9608F", "#D55E00", "#E69F00")
"""Early to late: from blue to orange by way of purple, all of a lightness that shows on white and on black."""
ONE_MEMBER = {kind.__name__: kind for kind in (Drop, ReplaceWithLast)}
"""Operators that keep the weights of one member and leave the others' out."""


def when(global_step: int | None) -> str:
    """The optimizer step of a merge, in two words."""
    return "no training" if global_step is None else f"step {global_step}"


@dataclass(frozen=True)
class Stage:
    """The merges of one optimizer step."""

    global_step: int | None
    """Optimizer steps done; None = outside training."""
    depth: int
    """Layers that are left after it."""
    color: str
    """Of what merged."""

    @property
    def label(self) -> str:
        """When it was, in two words."""
        return when(self.global_step)


@dataclass(frozen=True)
class Line:
    """A layer from where it comes into being to where it merges or ends."""

    begin: float
    """Column where it begins; 0 = the teacher's."""
    end: float
    """Column where it ends; `columns` = the student's."""
    row: float
    """Its height."""
    joins: float
    """Height of the merged layer that it becomes part of; its own where it becomes the student's."""
    color: str
    """The stage's that made it; empty for a layer that has not merged so far."""
    kept: bool
    """Whether the next merge uses its weights."""


@dataclass(frozen=True)
class Joint:
    """A merge."""

    column: float
    """Where the layers meet."""
    row: float
    """Height of the merged layer."""
    color: str
    """The stage's."""
    said: str
    """One line about it."""


@dataclass(frozen=True)
class Leaf:
    """A student layer."""

    layer: int
    """Its number."""
    row: float
    """Its height."""
    color: str
    """Of its last merge; empty for one that never merged."""
    ancestors: tuple[int, ...]
    """The teacher layers."""

    @property
    def named(self) -> str:
        """The ancestors, as a run."""
        return runs_of(self.ancestors)


@dataclass(frozen=True)
class Tree:
    """The family tree of a student, as it is drawn."""

    teacher_depth: int
    """Layers of the teacher, one row each."""
    columns: int
    """Number of the student's column; the teacher's is 0."""
    stages: tuple[Stage, ...]
    """In order."""
    headings: tuple[tuple[float, Stage], ...]
    """The columns that have a heading; not all where there are many."""
    lines: tuple[Line, ...]
    """Every layer there ever was."""
    joints: tuple[Joint, ...]
    """Every merge."""
    leaves: tuple[Leaf, ...]
    """The student's layers, in order."""

    @property
    def leaves_out(self) -> bool:
        """Whether an operator has left the weights of a layer out."""
        return not all(line.kept for line in self.lines)


@dataclass
class _Node:
    """A layer of the student as it stands."""

    begin: float
    row: float
    ancestors: tuple[int, ...]
    color: str = ""


HEADINGS = 5
"""Columns with a heading at most: more would overlap on a telephone."""


def family_tree(history: MergeHistory) -> Tree:
    """Replays a history and notes where every layer begins, joins and ends."""
    stages = _stages(history)
    columns = _columns(history)
    places = {column: number + 1 for number, column in enumerate(sorted(set(columns)))}
    end = len(places) + 1
    nodes = [_Node(0, layer, (layer,)) for layer in range(history.teacher_depth)]
    lines: list[Line] = []
    joints: list[Joint] = []
    for step, column in zip(history.steps, columns, strict=True):
        stage = stages[column[0]]
        members = [nodes[index] for index in step.group]
        merged = _merged(members, places[column], stage.color)
        lines += _joining(members, merged, _left_out(step))
        joints.append(Joint(merged.begin, merged.row, stage.color, _said(step, merged.ancestors, stage)))
        nodes[step.group[0] : step.group[-1] + 1] = [merged]
    lines += [Line(node.begin, end, node.row, node.row, node.color, True) for node in nodes]
    leaves = [Leaf(number, node.row, node.color, node.ancestors) for number, node in enumerate(nodes)]
    headings = _headings(places, stages)
    return Tree(history.teacher_depth, end, tuple(stages), tuple(headings), tuple(lines), tuple(joints), tuple(leaves))


def colors(count: int) -> list[str]:
    """So many colours from early to late."""
    spots = [index * (len(SCALE) - 1) / max(1, count - 1) for index in range(count)]
    return [_between(SCALE[int(spot)], SCALE[min(int(spot) + 1, len(SCALE) - 1)], spot % 1) for spot in spots]


def runs_of(layers: Sequence[int]) -> str:
    """Consecutive layers in a few characters: 6-8."""
    return f"{layers[0]}\N{EN DASH}{layers[-1]}" if len(layers) > 1 else str(layers[0])


def _between(one: str, other: str, part: float) -> str:
    pairs = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + part * (b - a)):02X}" for a, b in pairs)


def _stages(history: MergeHistory) -> list[Stage]:
    """Consecutive merges of the same optimizer step are one stage."""
    depth, found = history.teacher_depth, list[tuple[int | None, int]]()
    for step in history.steps:
        depth -= step.absorbed
        if found and found[-1][0] == step.global_step:
            found.pop()
        found.append((step.global_step, depth))
    return [Stage(*each, color) for each, color in zip(found, colors(len(found)), strict=True)]


def _columns(history: MergeHistory) -> list[tuple[int, int]]:
    """For every merge its stage, and its generation within the stage."""
    layers: list[tuple[int, int]] = [(-1, 0)] * history.teacher_depth
    columns, stage, last = [], -1, object()
    for step in history.steps:
        stage += step.global_step != last
        last = step.global_step
        generation = 1 + max((born[1] for index in step.group if (born := layers[index])[0] == stage), default=-1)
        columns.append((stage, generation))
        layers[step.group[0] : step.group[-1] + 1] = [(stage, generation)]
    return columns


def _merged(members: Sequence[_Node], column: int, color: str) -> _Node:
    ancestors = tuple(layer for member in members for layer in member.ancestors)
    return _Node(column, (ancestors[0] + ancestors[-1]) / 2, ancestors, color)


def _joining(members: Sequence[_Node], merged: _Node, left_out: Sequence[int]) -> Iterator[Line]:
    for place, member in enumerate(members):
        yield Line(member.begin, merged.begin, member.row, merged.row, member.color, place not in left_out)


def _left_out(step: MergeStep) -> list[int]:
    """Members whose weights are not in the merged layer, by their place in the group."""
    # Of a history that somebody else wrote, no class is imported to draw a picture.
    if step.operator_name not in ONE_MEMBER:
        return []
    source = from_spec(step.operator).source(step.shares)
    return [place for place in range(len(step.group)) if place != source]


def _said(step: MergeStep, ancestors: Sequence[int], stage: Stage) -> str:
    refit = f", then {step.refit_name}" if step.refit else ""
    return f"{stage.label}: teacher layers {runs_of(ancestors)} become one ({step.operator_name}{refit})"


def _headings(places: dict[tuple[int, int], int], stages: Sequence[Stage]) -> list[tuple[float, Stage]]:
    """A heading over the last column of a stage; of many stages every second, third ... and the last."""
    last = {stage: place for (stage, _), place in sorted(places.items())}
    every = -(-len(stages) // HEADINGS)
    return [(last[index], stages[index]) for index in range(len(stages)) if (len(stages) - 1 - index) % every == 0]
