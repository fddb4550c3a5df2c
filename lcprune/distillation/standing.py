"""Where a run stands, beside its step and its history: what its schedule is asked with, and its checkpoints keep.

    tokens      read so far, padding not: every rank counts its own, they are added up when somebody asks
    since       validation perplexities since the last merge
    asked       the step and the tokens at which the schedule was asked last: it is asked once a step
    refused     the steps at which a merge was undone, because it cost too much

The module owns it, `ProgressiveCollapse` keeps it up to date. What comes in is the same on every rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcprune.distillation.schedules import Facts
from lcprune.errors import InputError
from lcprune.merging.calibration import Batch, mask_of
from lcprune.merging.lineage import MergeHistory

JUDGE = "val/perplexity"
"""The metric that recovery is judged by."""
BEFORE = "val/perplexity_before_merge"
"""Where the last step of a merge says, in `measured`, what validation perplexity was right before it."""


@dataclass
class Standing:
    """What a run has read, validated and refused."""

    asked: tuple[int, int] = (-1, -1)
    """Step and tokens at which the schedule was asked last."""
    since: tuple[float, ...] = ()
    """Validation perplexities since layers merged, or since it was last tried."""
    refused: tuple[int, ...] = ()
    """Optimizer steps at which a merge was undone."""
    pending: bool = False
    """Whether a validation was due that is not among `since` yet."""
    counted: int = 0
    """Tokens of all ranks when they were added up last."""
    _own: int | Tensor = field(default=0, repr=False)  # of this rank, not added up yet
    _under_way: int | Tensor = field(default=0, repr=False)  # of this rank's batches since the last optimizer step

    def read(self, batch: Batch) -> None:
        """Takes a batch of this rank in, without waiting for the device; it counts once its optimizer step is done."""
        self._under_way = self._under_way + tokens_of(batch)

    def stepped(self) -> None:
        """An optimizer step is done. A checkpoint from before it would have the run read its batches again."""
        self._own, self._under_way = self._own + self._under_way, 0

    def tokens(self) -> int:
        """Those of all ranks, which meet in here."""
        own = torch.as_tensor(self._own, dtype=torch.int64)
        self._own = 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if not own.is_cuda and torch.distributed.get_backend() == "nccl":
                own = own.cuda()
            torch.distributed.all_reduce(own)
        self.counted += int(own)
        return self.counted

    def merged(self, step: int) -> None:
        """Layers have merged, or a merge was tried, after so many optimizer steps; ranks meet in here."""
        self.asked, self.since = (step, self.tokens()), ()

    def validated(self, perplexity: float) -> None:
        """Takes down a validation."""
        self.since, self.pending = (*self.since, perplexity), False

    def facts(self, step: int, history: MergeHistory, begun: int) -> Facts:
        """All that a schedule may look at; its tokens are those of when `tokens` was asked last.

        Args:
            step: Optimizer steps done.
            history: Of the student as it stands.
            begun: Layers with which the run began.
        """
        own = [merge for merge in history.steps if merge.global_step is not None]
        return Facts(
            step=step,
            begun=begun,
            depth=history.depth,
            tokens=self.counted,
            tokens_before=self.asked[1],
            merged=bool(own),
            refused=bool(self.refused),
            before=own[-1].measured.get(BEFORE) if own else None,
            since=self.since,
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data for a checkpoint; ranks meet in here."""
        return {
            "asked": self.asked,
            "since": self.since,
            "refused": self.refused,
            "pending": self.pending,
            "counted": self.tokens(),
        }

    @classmethod
    def of(cls, data: Mapping[str, object]) -> "Standing":
        """What `to_dict` wrote; a run that has not begun where there is nothing."""
        return cls(**data)  # type: ignore[arg-type]


def tokens_of(batch: Batch) -> int | Tensor:
    """Tokens of a batch that are not padding, of prompts too.

    Raises:
        InputError: The batch is not one of a language model, with `input_ids`.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise InputError(
            f"ByTokens counts the `input_ids` of every batch, and this one is a {type(batch).__name__} without: let "
            "the data module yield dictionaries with input_ids, or merge at steps (Evenly, AtSteps)."
        )
    mask = mask_of(batch)
    return batch["input_ids"].numel() if mask is None else mask.sum()
