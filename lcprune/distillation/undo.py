"""A merge that costs too much is taken back, bit for bit.

    jump = perplexity after the merge and its refit / perplexity of the student right before it

both on the calibration text, which refits are fitted to: allow for that. Weights and structure come back by reference,
so that only what the merge has replaced exists twice meanwhile; optimizer, learning rate and callbacks are brought
along only once a merge is kept.
"""

from collections.abc import Callable

from lcprune.distillation.guests import Shortened
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.within import MEASURED

STUDENT = "calibration/perplexity_before_merge"
"""Where the last step's `measured` says what the calibration perplexity was; `MEASURED` is that after the merge."""


class Undo:
    """A student before a merge, and how much the merge may cost."""

    def __init__(self, module: Shortened, perplexity: Callable[[], float], max_jump: float) -> None:
        """Measures the student and remembers it.

        Args:
            module: Whose student is about to merge.
            perplexity: Measures it on the calibration text; the same on every rank.
            max_jump: By what a merge may multiply that.
        """
        self._module, self._perplexity, self._max_jump = module, perplexity, max_jump
        self._history = module.history
        self.before = self.after = perplexity()
        """The calibration perplexities."""
        memory = surgery.Memory(module.student)
        memory.note(*layout_of(module.student.config).layers_of(module.student))
        self._memory: surgery.Memory | None = memory

    def if_too_much(self) -> bool:
        """Measures the merged student once, and takes the merge back if it cost too much; whether it did."""
        assert self._memory is not None, "asked twice"
        self.after = self._perplexity()
        too_much = not self.after <= self._max_jump * self.before  # nor is what is no number
        if too_much:
            self._memory.restore()
            self._module.history = self._history
        self._memory = None  # what was replaced need not stay alive
        return too_much

    @property
    def figures(self) -> dict[str, float]:
        """What was measured, for the history."""
        return {STUDENT: self.before, MEASURED: self.after}

    def __str__(self) -> str:
        return (
            f"calibration perplexity {self.before:.4g} -> {self.after:.4g}, {self.after / self.before:.3g} times, "
            f"collapse.max_perplexity_jump is {self._max_jump}"
        )
