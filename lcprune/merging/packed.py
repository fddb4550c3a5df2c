"""Rows that hold several documents: which models keep these apart."""

import transformers
from transformers import PretrainedConfig

from lcprune.errors import InputError

_MASKS_FALCON = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
UNPACKABLE = ("bloom", "opt") if _MASKS_FALCON else ("bloom", "opt", "falcon")
"""Families whose attention in transformers does not look at position ids: documents in a row would see each other."""


def check_packable(config: PretrainedConfig, rows: int) -> None:
    """Refuses rows of several documents where attention would not keep these apart.

    transformers makes the block-diagonal mask from position ids, and flash attention from those of a single row.

    Args:
        config: Of the model.
        rows: B.

    Raises:
        InputError: It would not.
    """
    if config.model_type in UNPACKABLE:
        raise InputError(
            f"data.packing=separate: attention of the family {config.model_type!r} cannot keep documents of one block "
            f"apart in transformers {transformers.__version__}: set data.packing to pad, or to concatenate."
        )
    if one_packed_row(config) and rows > 1:
        raise InputError(
            f"data.packing=separate with {config._attn_implementation} keeps documents apart in one block at a time, "
            f"and data.batch_size is {rows}: set data.batch_size to 1 (with trainer.accumulate_grad_batches), or "
            "data.packing to pad."
        )


def one_packed_row(config: PretrainedConfig) -> bool:
    """Whether attention keeps documents apart in a batch of one row only."""
    return "flash" in (getattr(config, "_attn_implementation", None) or "")
