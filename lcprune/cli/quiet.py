"""Keeps the console for what concerns the user: no loading bars, no tips, no advice of libraries about themselves."""

import logging
import os
import warnings


def quieten() -> None:
    """Silences transformers' bars and warnings and Lightning's hints; to be called once per command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from datasets.utils.logging import disable_progress_bar as no_data_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    no_data_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a missing network is told once, by our own sentence
    saving = "lightning.pytorch.trainer.connectors.checkpoint_connector"
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", saving):
        logging.getLogger(name).addFilter(_no_hints)
    for pattern in (
        r".*does not have many workers.*",
        r".*isinstance\(treespec, LeafSpec\).*",
        r"Precision bf16-mixed is not supported by the model summary.*",
        r"Checkpoint directory .* exists and is not empty.*",
        r"Experiment logs directory .* exists and is not empty.*",
        r"The number of training batches .* is smaller than the logging interval.*",
        r"Found \d+ module\(s\) in eval mode.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    warnings.formatwarning = _one_line


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning without the place in the code that gives it."""
    return f"warning: {' '.join(str(message).split())}\n"


def _no_hints(record: logging.LogRecord) -> bool:
    devices = ("GPU available", "TPU available", "HPU available", "Using bfloat16")
    # The last is about what a checkpoint holds, and reads as if it were about how one is loaded.
    others = ("💡", "Seed set", "Loading `train", "`weights_only` was not set")
    return not record.getMessage().startswith(devices + others)
