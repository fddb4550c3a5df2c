"""What the machine does to a run, told apart by what torch says, and as one sentence.

no memory      torch.OutOfMemoryError, MemoryError, or a RuntimeError of the CPU's allocator
a rank lost    the others' exchange with it breaks off
"""

MEMORY = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "not enough memory")
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "NCCL communicator was aborted",
    "remote process exited",
    "wait timeout",
)
RANK_0_IS_GONE = "rank 0 died, and this rank ends with it: start all of them again with --ckpt_path last."
LOWER = (
    "lower data.batch_size (and raise trainer.accumulate_grad_batches by as much) or data.block_size; in training "
    "model.activations: recompute, trainer.precision: bf16-mixed or adapters (model.train: lora) need less too"
)


def sentence(error: BaseException) -> str | None:
    """What to say of an error that the machine has caused; None = it is none of these, but a defect."""
    reason = " ".join(str(error).partition("\n")[0].split())[:200]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _says(error, MEMORY):
        return f"not enough memory ({reason or 'of the machine'}): {LOWER}."
    if isinstance(error, RuntimeError) and _says(error, LOST):
        return (
            f"the exchange with another rank broke off ({reason}): it died or its network failed, see its own "
            "message; start all of them again with --ckpt_path last."
        )
    return None


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
