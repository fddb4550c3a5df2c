"""Where a run stands between two optimizer steps, so that a checkpoint never tells of half a step.

    | step k | micro-batch, micro-batch, ... micro-batch, update | merge | checkpoint | step k+1 ...
    ^        ^ what a checkpoint from in here says      ^ torn: refused ^

With accumulated gradients, after an exception or by the clock, Lightning writes checkpoints from the middle of a step:
the weights of its beginning, a loader that has moved on, and no gradients. The resumed run would miss those batches.
Here such a checkpoint says loops, loaders and random numbers as they were when the step began, whose weights it holds:
the step is begun anew, and ends bit for bit as it would have. While an update or a merge is changing the weights
there is nothing to save.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lightning.pytorch import Trainer

from lcprune.distillation.randomness import RngState, rng_state
from lcprune.distillation.standing import Standing
from lcprune.errors import RunError

Loops = dict[str, object]

POSITIONS = ({"epoch", "batch", "batches"}, {"round", "row", "batch"})
"""By which keys the positions of our loaders (of blocks, of a stream) are known."""


class StepBoundary:
    """The latest instant between two optimizer steps, kept while a step is under way."""

    def __init__(self) -> None:
        self._step = -1  # optimizer steps done when the latest step began
        self._loops: Loops = {}
        self._rng: RngState | None = None
        self._validations: dict[str, object] = {}
        self._stepping = -1  # as _step, once the optimizer is about to change the weights
        self._changing: str | None = None  # what else is changing them right now

    def begin(self, trainer: Trainer, standing: Standing) -> None:
        """To be called at the start of every batch; only that of a step's first one counts."""
        if self._step != trainer.global_step:
            self._step = trainer.global_step
            self._loops = before_batch(trainer.fit_loop.state_dict())
            self._rng = rng_state()
            self._validations = {"since": standing.since, "pending": standing.pending}

    def before_update(self) -> None:
        """From here on the optimizer changes the weights, until the trainer counts the step as done."""
        self._stepping = self._step

    @contextmanager
    def changing(self, by: str) -> Iterator[None]:
        """Weights are being changed in this block; if it raises they stay unfit to be saved."""
        self._changing = by
        yield
        self._changing = None

    def random_state(self, step: int) -> RngState:
        """Of this process, as a checkpoint after so many optimizer steps has to say it."""
        return self._rng if self._rng is not None and step == self._step else rng_state()

    def standing(self, now: dict[str, object], step: int) -> dict[str, object]:
        """What a checkpoint after so many optimizer steps has to say of validations: those in the step come again.

        Args:
            now: As `Standing.to_dict`.
            step: Optimizer steps done.
        """
        return {**now, **self._validations} if step == self._step else now

    def rewind(self, checkpoint: dict[str, object], step: int) -> None:
        """Makes a checkpoint that is being written say where its weights belong.

        Args:
            checkpoint: As Lightning has made it.
            step: Optimizer steps done.

        Raises:
            RunError: The weights are just being changed.
        """
        by = "The optimizer" if step == self._stepping else self._changing
        if by is not None:
            raise RunError(
                f"{by} was changing the student's weights: what is half changed is not saved, the checkpoint before it "
                "stays; go on with --ckpt_path last."
            )
        if step == self._step:
            loops = checkpoint["loops"]
            assert isinstance(loops, dict)
            loops["fit_loop"] = self._loops


def before_batch(loops: Loops) -> Loops:
    """The state of Lightning's fit loop at a batch's start, as it was before the batch was fetched.

    Loaders that say their position as ours do are put back by one batch; one of another kind goes on behind it.
    """
    progress = loops["epoch_loop.batch_progress"]
    assert isinstance(progress, dict)
    counts = {name: {**progress[name], "ready": progress[name]["ready"] - 1} for name in ("total", "current")}
    state = loops["state_dict"]
    assert isinstance(state, dict)
    loaders = [_put_back(loader) for loader in state.get("combined_loader", [])]
    return {
        **loops,
        "epoch_loop.batch_progress": {**progress, **counts, "is_last_batch": False},
        "state_dict": {**state, "combined_loader": loaders} if loaders else state,
    }


def _put_back(loader: object) -> object:
    if isinstance(loader, Mapping) and any(ours <= set(loader) for ours in POSITIONS) and loader["batch"]:
        return {**loader, "batch": loader["batch"] - 1}
    return loader
