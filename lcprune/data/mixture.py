"""A text out of several data sets, each with a weight.

    weights 2 : 1,  sets of 900 and 1000 tokens  ->  all 900 of the first, documents with 450 of the second

Weights are shares of the tokens. Nothing is repeated: the set that is shortest for its weight is taken whole, and of
the others so many documents, drawn by the seed, as their weights allow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcprune.data.columns import TEXT, Columns
from lcprune.data.loader import generator
from lcprune.errors import InputError


@dataclass(frozen=True)
class Part:
    """One data set of a mixture: a file or a set on the hub."""

    path: Path | None = None
    """A local .jsonl, .json, .csv, .parquet or .txt file, or a folder or pattern of several."""
    dataset: str | None = None
    """Name of a data set on the Hugging Face hub."""
    dataset_config: str | None = None
    """Its configuration, where it has several."""
    split: str = "train"
    """Its split."""
    weight: float = 1.0
    """Share of the tokens, relative to the other parts' weights."""
    text_column: str = TEXT
    """The column that holds text."""
    messages_column: str | None = None
    """The column that holds conversations."""
    prompt_column: str | None = None
    """The column that holds prompts."""
    response_column: str | None = None
    """The column that holds the responses."""

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", Path(self.path).expanduser())
        mistakes = self.columns.mistakes()
        if (self.path is None) == (self.dataset is None):
            mistakes.append("name a path or a dataset in every part, and not both")
        if self.path is not None and (self.dataset_config is not None or self.split != "train"):
            mistakes.append("dataset_config and split belong to a dataset, not to a path")
        if not 0 < self.weight < float("inf"):
            mistakes.append(f"weight={self.weight} must be greater than 0")
        if mistakes:
            raise InputError(f"data.mixture: {'; '.join(mistakes)}.")

    @property
    def columns(self) -> Columns:
        """The columns that are named."""
        return Columns(self.text_column, self.messages_column, self.prompt_column, self.response_column)

    @property
    def name(self) -> str:
        """What the part is called in messages."""
        return str(self.path if self.path is not None else self.dataset)


def shares(lengths: Sequence[Tensor], weights: Sequence[float], seed: int) -> list[Tensor]:
    """Which documents of every set are taken, bool [N] each.

    Args:
        lengths: Of every set, the tokens of its documents, [N].
        weights: Of every set.
        seed: Decides which documents.

    Example:
        shares([tensor([5, 5]), tensor([2, 2, 2])], [2, 1], 0)  ->  all of the first, two of the second
    """
    unit = min(int(each.sum()) / weight for each, weight in zip(lengths, weights, strict=True))
    return [
        _drawn(each, round(unit * weight), generator(seed, f"mixture/{number}"))
        for number, (each, weight) in enumerate(zip(lengths, weights, strict=True))
    ]


def _drawn(lengths: Tensor, wanted: int, random: torch.Generator) -> Tensor:
    """Documents with as nearly so many tokens as whole ones allow, at least one."""
    order = torch.randperm(len(lengths), generator=random)
    ends = lengths[order].cumsum(0)
    count = int((ends - lengths[order] / 2 <= wanted).sum())  # the next one would take it further away
    taken = torch.zeros(len(lengths), dtype=torch.bool)
    taken[order[: max(count, 1)]] = True
    return taken
