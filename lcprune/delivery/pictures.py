"""Scores of layers as one picture: what every criterion says, and LaCo's figures 4 and 5 (arXiv:2402.11187).

    +---------------------------+------------------+
    | among the safest          |                  |
    | criterion 1               |  cosine of the   |
    | criterion 2               |  stream between  |
    | ...                       |  all boundaries  |
    | L2 between neighbours     |                  |     everything on the left shares the axis of layers
    +---------------------------+------------------+

The only module that imports matplotlib (extra `report`), and only to draw. Colours: Okabe and Ito's for marks, cividis
for fields, so that nobody needs to tell red from green.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from math import inf, isfinite, nan
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lcprune.files import for_json
from lcprune.merging.criteria import SAFEST, ranking
from lcprune.merging.heatmaps import WeightDistances

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

SAFE, LOUD, PLAIN, INK = "#0072B2", "#D55E00", "#B0B4BA", "#333333"
FIELD = "cividis"
CEILING = 3.0
"""A score is drawn to scale up to so many times the distance of the upper quartile from the least score."""
DOTS_PER_INCH = 130


@dataclass(frozen=True)
class Theme:
    """Colours of a picture's ground and of what is not data."""

    paper: str
    """The ground."""
    ink: str
    """Text."""
    line: str
    """Axes, and marks that stand back."""
    grid: str
    """Lines to read values by."""


LIGHT = Theme("#FFFFFF", INK, PLAIN, "#E8E8E8")
DARK = Theme("#1B1F24", "#D6DBE1", "#69727D", "#2E343B")


@contextmanager
def canvas(
    width: float, height: float, *, theme: Theme = LIGHT, font: float = 9, dots: int = DOTS_PER_INCH
) -> "Iterator[tuple[Figure, BytesIO]]":
    """A figure to draw on in the house style; when the block ends, the PNG is in the second.

    Args:
        width: Inches.
        height: Inches.
        theme: Colours.
        font: Size of the text in points.
        dots: Pixels of the PNG per inch.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": font,
        "axes.titlesize": font + 1,
        "axes.titlelocation": "left",
        "axes.edgecolor": theme.line,
        "axes.facecolor": theme.paper,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
    }
    picture = BytesIO()
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, picture
        figure.savefig(picture, format="png", dpi=dots, facecolor=theme.paper)


@dataclass(frozen=True)
class Scores:
    """What `lcprune score` found out about one model."""

    model: str
    """Name of the model."""
    dtype: str
    """Type of its weights."""
    tokens: int
    """Calibration tokens behind the figures."""
    criteria: Mapping[str, tuple[float, ...]]
    """Name of a criterion -> score per layer, lower = safer to merge; over a span it has fewer entries."""
    weights: WeightDistances
    """Distances between the weights of neighbouring layers."""
    cosines: tuple[tuple[float, ...], ...]
    """Mean cosine of the stream between every two boundaries; 0 = the embeddings."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.cosines) - 1

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; what is no finite number becomes None."""
        return {name: for_json(value) for name, value in asdict(self).items()} | {"layers": self.layers}


def missing() -> str | None:
    """What to do about a missing matplotlib, in one sentence; None if it is there."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return "pictures need matplotlib, which is not installed: pip install 'lcprune[report]'."


def draw_scores(scores: Scores) -> bytes:
    """The picture as PNG.

    Args:
        scores: Of a model of two layers or more.
    """
    from matplotlib.ticker import MaxNLocator

    rows = len(scores.criteria) + 2
    with canvas(15, 1.5 + 1.15 * rows) as (figure, picture):
        figure.suptitle(
            f"{scores.model}: which of its {scores.layers} layers are safe to merge?  Lower = safer.\n"
            f"{scores.tokens:,} calibration tokens, weights in {scores.dtype}; "
            f"1 to {SAFEST} = the safest by each criterion, ▲ = beyond the axis",
            fontsize=12,
            x=0.01,
            ha="left",
        )
        grid = figure.add_gridspec(rows, 2, width_ratios=(1.55, 1), height_ratios=(0.7, *[1] * (rows - 2), 2))
        shared = figure.add_subplot(grid[0, 0])
        _votes(shared, scores)
        for row, (name, values) in enumerate(scores.criteria.items(), 1):
            behind = scores.layers - len(values)
            title = f"{name}{f': a layer and the {behind} behind it' if behind else ''}"
            _criterion(figure.add_subplot(grid[row, 0], sharex=shared), title, values)
        below = figure.add_subplot(grid[rows - 1, 0], sharex=shared)
        _weights(below, scores.weights)
        shared.set_xlim(-0.7, scores.layers - 0.3)
        shared.xaxis.set_major_locator(MaxNLocator(30, integer=True))
        below.set_xlabel("layer")
        split = 1 + (rows - 1) * 3 // 5
        _cosines(figure.add_subplot(grid[:split, 1]), scores)
        _agreement(figure.add_subplot(grid[split:, 1]), scores)
    return picture.getvalue()


def _votes(axes: "Axes", scores: Scores) -> None:
    """How many criteria have a layer among the safest; a span votes for all its layers."""
    votes = [0] * scores.layers
    for values in scores.criteria.values():
        span = scores.layers - len(values) + 1
        for layer in {start + step for start in ranking(values)[:SAFEST] for step in range(span)}:
            votes[layer] += 1
    bars = axes.bar(range(scores.layers), votes, color=[SAFE if 2 * v >= max(votes) else PLAIN for v in votes])
    axes.bar_label(bars, labels=[str(count or "") for count in votes], fontsize=8)
    axes.set_title(f"how many of the {len(scores.criteria)} criteria have a layer among their safest {SAFEST}")
    axes.set_ylim(0, 1.35 * max(votes))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(labelsize=8)


def _criterion(axes: "Axes", title: str, values: Sequence[float]) -> None:
    """One criterion over the layers, the safest with their ranks; what is far off the others leaves at the top."""
    top = _ceiling(values)
    shown = [value if value <= top else nan for value in values]
    axes.plot(range(len(values)), shown, color=PLAIN, marker="o", markersize=3.5, linewidth=1.2, zorder=1)
    axes.margins(y=0.25)
    axes.grid(axis="y", color="#E8E8E8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title)
    axes.tick_params(labelbottom=False)
    axes.locator_params(axis="y", nbins=3)
    for rank, layer in enumerate(ranking(values)[:SAFEST], 1):
        if isfinite(shown[layer]):
            axes.scatter([layer], [values[layer]], s=120, color=SAFE, zorder=2, clip_on=False)
            axes.text(layer, values[layer], str(rank), color="white", fontsize=8, ha="center", va="center_baseline")
    edge = axes.get_xaxis_transform()  # layers across, fractions of the height upwards
    lower = False
    for layer, value in enumerate(values):
        beyond = not value <= top
        lower = beyond and layer > 0 and not values[layer - 1] <= top and not lower  # or neighbours' figures overlap
        if beyond:
            note = f"▲\n{lower * chr(10)}{_short(value)}"
            axes.text(layer, 1.0, note, transform=edge, ha="center", va="top", fontsize=7.5, color=LOUD)


def _short(value: float) -> str:
    """A number in few characters: 312.4 -> 312, 312400 -> 312k."""
    if not isfinite(value) or abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value / 1000:.0f}k" if abs(value) < 1e6 else f"{value:.0e}"


def _ceiling(values: Sequence[float]) -> float:
    """The largest score that is drawn to scale: the ends of a model are often so far off that nothing else shows."""
    finite = sorted(value for value in values if isfinite(value))
    if not finite:
        return inf
    quarter = finite[(3 * (len(finite) - 1)) // 4]
    return max(value for value in finite if value <= finite[0] + CEILING * (quarter - finite[0]))


def _weights(axes: "Axes", weights: WeightDistances) -> None:
    """LaCo's figure 4: the L2 distance of corresponding matrices of layers l and l + 1."""
    columns = [list(column) for column in zip(*weights.raw, strict=True)]
    relative = [fmean(column) for column in zip(*weights.normalised, strict=True)]
    # A cell lies between the two layers that it compares.
    extent = (0, len(weights.raw), len(columns) - 0.5, -0.5)
    field = axes.imshow(columns, aspect="auto", cmap=FIELD, extent=extent, interpolation="nearest")
    labels = [
        f"{name.removesuffix('.weight')}  {value:.2f}" for name, value in zip(weights.matrices, relative, strict=True)
    ]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title(
        "L2 distance of the weights of neighbours (LaCo, figure 4); the figure beside a name: 1 = orthogonal"
    )
    axes.figure.colorbar(field, ax=axes, pad=0.01, fraction=0.03)


def _cosines(axes: "Axes", scores: Scores) -> None:
    """LaCo's figure 5: cosine of the stream between all boundaries."""
    field = axes.imshow(scores.cosines, cmap=FIELD, vmax=1, interpolation="nearest")
    axes.set_title("cosine of the residual stream between layers (LaCo, figure 5)")
    axes.set_xlabel("after so many layers (0 = embeddings)")
    axes.set_ylabel("after so many layers")
    axes.figure.colorbar(field, ax=axes, pad=0.02, fraction=0.046)


def _agreement(axes: "Axes", scores: Scores) -> None:
    """Rank correlation of the criteria that score single layers."""
    single = {name: values for name, values in scores.criteria.items() if len(values) == scores.layers}
    ranks = [[ranking(values).index(layer) for layer in range(scores.layers)] for values in single.values()]
    table = [[_correlation(one, other) for other in ranks] for one in ranks]
    axes.imshow(table, cmap=FIELD, vmin=-1, vmax=1)
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            color = INK if value > 0 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    axes.set_xticks(range(len(single)), list(single), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(single)), list(single))
    axes.set_title("do the criteria agree? rank correlation over the layers (1 = same order)")


def _correlation(one: Sequence[int], other: Sequence[int]) -> float:
    """Spearman's, of two rankings without ties."""
    n = len(one)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / (n * (n * n - 1))
