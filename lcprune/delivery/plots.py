"""The pictures of a report: PNGs of one width, in the colours of a theme, so that a page shows them on white or black.

loss, perplexity      over tokens, merges as lines in the colours of the family tree
kinship               how much a student layer's stream is still the teacher's, layer by layer
heat, distances       what layers have in common (LaCo, figures 5 and 4)
frontier              quality against size or speed, over several runs
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean, median
from typing import TYPE_CHECKING

from lcprune.delivery.pictures import FIELD, LOUD, SAFE, Theme, canvas
from lcprune.delivery.training_log import Points, TrainingLog
from lcprune.delivery.tree import colors
from lcprune.merging.heatmaps import WeightDistances

if TYPE_CHECKING:
    from lcprune.delivery.pictures import Axes, Figure

WIDTH, HEIGHT, FONT, DOTS = 4.9, 3.3, 10.5, 190
"""Inches, points, pixels per inch: two beside each other on a desk, one below the other on a telephone."""
TERMS = {"logits": "#009E73", "boundary": "#CC79A7", "local": "#E69F00", "labels": "#56B4E9"}
"""Colours of the parts of a loss (Okabe and Ito's)."""
WINDOW = 9
"""Points behind a smoothed loss."""
SMOOTHED_FROM = 60
"""So many points are too ragged to be read without smoothing."""
MOST_LABELS = 8
"""Merges that are labelled one by one."""
ABOVE_LABELS = 20
"""Points between a title and the axes, where merges are labelled."""


@dataclass(frozen=True)
class Clock:
    """What a curve runs over."""

    tokens_per_step: int | None
    """Tokens of an optimizer step; None = not known, and curves run over steps."""

    @property
    def unit(self) -> str:
        """Name of the axis."""
        return "optimizer steps" if self.tokens_per_step is None else "tokens"

    def at(self, step: float) -> float:
        """Where on the axis an optimizer step ends."""
        return step * (self.tokens_per_step or 1)


@dataclass(frozen=True)
class Spot:
    """A model among others."""

    mark: str
    """What is written into its dot."""
    cost: float
    """Size or speed, relative to the teacher's."""
    loss: float
    """Perplexity, relative to the teacher's."""


def loss(log: TrainingLog, clock: Clock, theme: Theme) -> bytes:
    """The training loss and its parts."""
    with canvas(WIDTH, HEIGHT, theme=theme, font=FONT, dots=DOTS) as (figure, picture):
        axes = _over_time(figure, log, clock, theme)
        whole = log.points("train/loss")
        _curve(axes, _smooth(whole), clock, SAFE, 2.0, "loss")
        for name, color in TERMS.items():
            if (part := log.points(f"train/{name}")) and part != whole:
                _curve(axes, _smooth(part), clock, color, 1.1, name)
        if len(whole) >= SMOOTHED_FROM:
            _curve(axes, whole, clock, theme.line, 0.6, None)
        _log_scale(axes, [value for _, value in whole])
        _legend(axes)
        axes.set_title("training loss", pad=ABOVE_LABELS)
    return picture.getvalue()


def perplexity(log: TrainingLog, clock: Clock, theme: Theme) -> bytes:
    """Held-out perplexity, the teacher's beside it."""
    with canvas(WIDTH, HEIGHT, theme=theme, font=FONT, dots=DOTS) as (figure, picture):
        axes = _over_time(figure, log, clock, theme)
        points, teacher = log.points("val/perplexity"), log.points("val/teacher_perplexity")
        _curve(axes, points, clock, SAFE, 2.0, "student", marker="o")
        if teacher:
            axes.axhline(teacher[-1][1], color=theme.ink, linewidth=1.2, linestyle=(0, (5, 3)), label="teacher")
        _log_scale(axes, [value for _, value in (*points, *teacher)])
        _legend(axes)
        axes.set_title("perplexity on held-out text", pad=ABOVE_LABELS)
    return picture.getvalue()


def kinship(
    before: Sequence[float] | None, after: Sequence[float], merged: Sequence[int], theme: Theme, named: str
) -> bytes:
    """Cosine of every student layer's stream with that of its last teacher layer.

    Args:
        before: Per student layer, merged but not trained; None = not known.
        after: Per student layer, at the end.
        merged: Student layers that were merged.
        theme: Colours.
        named: What the student at the end is called.
    """
    with canvas(WIDTH, HEIGHT, theme=theme, font=FONT, dots=DOTS) as (figure, picture):
        axes = _plain(figure, theme)
        if before is not None:
            _per_layer(axes, before, merged, LOUD, "merged, not trained")
        _per_layer(axes, after, merged, SAFE, named)
        axes.set_xlabel("student layer (dots: merged ones)")
        axes.locator_params(axis="x", integer=True)
        axes.set_title("cosine with the teacher's stream, by lineage")
        _legend(axes)
    return picture.getvalue()


def heat(cosines: Sequence[Sequence[float]], lowest: float, theme: Theme, named: str) -> bytes:
    """Cosine of the stream between all boundaries of one model; `lowest` is the end of the scale."""
    with canvas(WIDTH, 4.1, theme=theme, font=FONT, dots=DOTS) as (figure, picture):
        axes = figure.add_subplot()
        field = axes.imshow(cosines, cmap=FIELD, vmin=lowest, vmax=1, interpolation="nearest")
        axes.set_title(f"cosine of the stream: {named}")
        axes.set_xlabel("after so many layers (0 = embeddings)")
        axes.set_ylabel("after so many layers")
        _bar(figure, axes, field, theme)
    return picture.getvalue()


def distances(weights: WeightDistances, highest: float, theme: Theme, named: str) -> bytes:
    """L2 distance of the weights of neighbours; beside a name, how large that is: 1 = orthogonal.

    Args:
        weights: Of a model of two layers or more.
        highest: The end of the scale.
        theme: Colours.
        named: What the model is called.
    """
    rows = [list(column) for column in zip(*weights.raw, strict=True)]
    relative = [fmean(column) for column in zip(*weights.normalised, strict=True)]
    with canvas(WIDTH, 1.6 + 0.28 * len(rows), theme=theme, font=FONT, dots=DOTS) as (figure, picture):
        axes = figure.add_subplot()
        extent = (0, len(weights.raw), len(rows) - 0.5, -0.5)
        field = axes.imshow(
            rows, aspect="auto", cmap=FIELD, vmin=0, vmax=highest, extent=extent, interpolation="nearest"
        )
        names = [name.removesuffix(".weight").rpartition(".")[2] for name in weights.matrices]
        axes.set_yticks(range(len(names)), [f"{n}  {r:.2f}" for n, r in zip(names, relative, strict=True)])
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("layer (a cell lies between two)")
        axes.set_title(f"L2 distance of neighbours' weights: {named}")
        _bar(figure, axes, field, theme)
    return picture.getvalue()


def frontier(spots: Sequence[Spot], better: int, label: str, theme: Theme) -> bytes:
    """Quality against a cost, and the line of those that no other beats in both.

    Args:
        spots: The teacher among them.
        better: -1 where less of the cost is better, 1 where more is.
        label: Of the cost.
        theme: Colours.
    """
    with canvas(WIDTH, 3.7, theme=theme, font=FONT, dots=DOTS) as (figure, picture):
        axes = _plain(figure, theme)
        axes.grid(axis="x", color=theme.grid, linewidth=0.8)
        best = unbeaten(spots, better)
        axes.plot([s.cost for s in best], [s.loss for s in best], color=theme.line, linewidth=1.4, zorder=1)
        for spot in sorted(spots, key=best.__contains__):
            color, ink = (SAFE, "white") if spot in best else (theme.grid, theme.ink)
            axes.scatter([spot.cost], [spot.loss], s=190, color=color, edgecolor=theme.paper, linewidth=1.5, zorder=2)
            axes.text(spot.cost, spot.loss, spot.mark, color=ink, ha="center", va="center_baseline", fontsize=9)
        axes.margins(0.12)
        axes.set_xlabel(label)
        axes.set_title("perplexity, teacher = 1 (lower is better)")
    return picture.getvalue()


def unbeaten(spots: Sequence[Spot], better: int) -> list[Spot]:
    """Those for which no other is at least as good in both and better in one; from the best cost on."""
    found: list[Spot] = []
    lowest = inf
    for spot in sorted(spots, key=lambda spot: (-better * spot.cost, spot.loss)):
        if spot.loss < lowest or (found and (spot.cost, spot.loss) == (found[-1].cost, found[-1].loss)):
            found.append(spot)
            lowest = spot.loss
    return found


def _plain(figure: "Figure", theme: Theme) -> "Axes":
    axes = figure.add_subplot()
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _over_time(figure: "Figure", log: TrainingLog, clock: Clock, theme: Theme) -> "Axes":
    """Axes with the merges on them, each in its colour with the depth it leads to."""
    axes = _plain(figure, theme)
    labelled = log.merges if len(log.merges) <= MOST_LABELS else log.merges[-1:]
    for (step, depth), color in zip(log.merges, colors(len(log.merges)), strict=True):
        axes.axvline(clock.at(step), color=color, linewidth=1.6, zorder=1)
        if (step, depth) in labelled:
            edge = axes.get_xaxis_transform()  # data across, fractions of the height upwards
            axes.text(clock.at(step), 1.02, str(depth), transform=edge, ha="center", va="bottom", fontsize=FONT - 1.5)
    axes.set_xlabel(clock.unit)
    axes.set_xlim(0, max(clock.at(log.last_step), 1))
    axes.xaxis.set_major_formatter(lambda value, place: short(value))
    return axes


def short(value: float) -> str:
    """A count in few characters: 12800 -> 12.8k."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _curve(
    axes: "Axes", points: Points, clock: Clock, color: str, width: float, label: str | None, *, marker: str = ""
) -> None:
    x, y = [clock.at(step) for step, _ in points], [value for _, value in points]
    axes.plot(
        x,
        y,
        color=color,
        linewidth=width,
        label=label,
        marker=marker,
        markersize=4.5,
        zorder=2 + width / 10,
        clip_on=False,
    )


def _smooth(points: Points) -> Points:
    """A running median where there are too many points to be read one by one."""
    if len(points) < SMOOTHED_FROM:
        return points
    values, half = [value for _, value in points], WINDOW // 2
    return tuple((step, median(values[max(0, at - half) : at + half + 1])) for at, (step, _) in enumerate(points))


def _log_scale(axes: "Axes", values: Sequence[float]) -> None:
    """Where values lie more than a factor of eight apart, each factor is as high as the next."""
    if values and min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")


def _legend(axes: "Axes") -> None:
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=FONT - 1, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _per_layer(axes: "Axes", values: Sequence[float], merged: Sequence[int], color: str, label: str) -> None:
    axes.plot(range(len(values)), values, color=color, linewidth=1.8, label=label)
    axes.scatter(merged, [values[layer] for layer in merged], s=26, color=color, zorder=3)


def _bar(figure: "Figure", axes: "Axes", field: object, theme: Theme) -> None:
    bar = figure.colorbar(field, ax=axes, pad=0.02, fraction=0.046)  # type: ignore[arg-type]
    bar.outline.set_edgecolor(theme.line)
