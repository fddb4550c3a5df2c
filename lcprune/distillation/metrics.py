"""What is measured on held-out text: perplexity, agreement with the teacher.

torchmetrics keeps the sums, so that ranks are put together rightly; logits exist for one chunk of tokens at a time.
Legend: `N` scored positions, `D` hidden, `V` vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from lcprune.distillation.fused import CHUNK
from lcprune.distillation.head import Head
from lcprune.merging.criteria import perplexity
from lcprune.merging.double import device_of_doubles, in_double

HELD_OUT = ("perplexity", "teacher_perplexity", "agreement")
"""Names of what `HeldOut` computes."""


class HeldOut(Metric):
    """Perplexity of student and teacher, and how often its most likely token is the teacher's."""

    full_state_update = False
    nats: Tensor
    teacher_nats: Tensor
    agreeing: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "teacher_nats", "agreeing", "tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """As in torchmetrics, but the sums stay float64: Lightning's bf16-true casts all, and 256 + 1 is 256."""

        def move(state: Tensor) -> Tensor:
            if state.dtype != torch.float64:
                return fn(state)
            return state.to(device_of_doubles(fn(state.float()).device))

        return super()._apply(move, exclude_state)

    def update(self, student_ND: Tensor, student: Head, teacher_ND: Tensor, teacher: Head, targets_N: Tensor) -> None:
        """Adds a batch.

        Args:
            student_ND: Student states at the scored positions, after the final norm.
            student: Student head.
            teacher_ND: Teacher states at the same positions.
            teacher: Teacher head.
            targets_N: Next token at every position.
        """
        for begin in range(0, len(targets_N), CHUNK):
            part = slice(begin, begin + CHUNK)
            student_CV = student(student_ND[part]).float()
            self.nats += in_double(cross_entropy(student_CV, targets_N[part], reduction="sum"))
            student_C = student_CV.argmax(-1)
            del student_CV
            teacher_CV = teacher(teacher_ND[part]).float()
            self.teacher_nats += in_double(cross_entropy(teacher_CV, targets_N[part], reduction="sum"))
            self.agreeing += in_double((student_C == teacher_CV.argmax(-1)).sum())
        self.tokens += len(targets_N)

    def compute(self) -> dict[str, Tensor]:
        """`perplexity` and `teacher_perplexity` = exp(mean nats per token), and `agreement`, a fraction."""
        tokens = int(self.tokens.item())
        if not tokens:
            return dict.fromkeys(HELD_OUT, torch.tensor(torch.nan))
        return {
            "perplexity": torch.tensor(perplexity(self.nats.item(), tokens)),
            "teacher_perplexity": torch.tensor(perplexity(self.teacher_nats.item(), tokens)),
            "agreement": (self.agreeing / tokens).float(),
        }
