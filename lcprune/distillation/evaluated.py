"""What validate, test and predict do: the student on held-out text, beside the teacher."""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from lcprune.distillation import objectives
from lcprune.distillation.levels import Labels, Level, Logits
from lcprune.distillation.metrics import HeldOut
from lcprune.distillation.teacher import Teacher
from lcprune.merging.calibration import Batch, next_tokens


class Evaluated(LightningModule):
    """A student and its teacher, and the loops in which nothing is trained."""

    student: PreTrainedModel
    """There once `configure_model` has run."""
    held_out: HeldOut
    """Over the validation or test text so far."""

    def __init__(self) -> None:
        super().__init__()
        self.held_out = HeldOut()
        self.teacher: Teacher | None = None

    def run(self, batch: Batch, levels: Sequence[Level]) -> objectives.Forward:
        """Student and teacher on a batch, as far as the levels need them."""
        raise NotImplementedError

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Perplexity and agreement with the teacher over the validation text."""
        self.observe(batch, self.held_out)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The same, logged as test; TextDataModule tests on the held-out text."""
        self.observe(batch, self.held_out)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/perplexity` and `val/agreement`."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Logs `test/perplexity` and `test/agreement`."""
        self._log_held_out("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """How the student goes on after the first half of every block, greedily, at most 64 tokens.

        Returns:
            `prompt` [B, T/2] and `continuation` [B, <= 64], token ids.
        """
        prompt = batch["input_ids"][:, : max(1, batch["input_ids"].shape[1] // 2)]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, : prompt.shape[1]]
        output = self.student.generate(  # type: ignore[operator]
            input_ids=prompt, attention_mask=mask, max_new_tokens=64, do_sample=False, use_cache=True
        )
        return {"prompt": prompt, "continuation": output[:, prompt.shape[1] :]}

    def observe(self, batch: Batch, metric: HeldOut) -> None:
        """Adds a batch to a metric, student beside teacher."""
        passes = self.run(batch, (Logits(), Labels()))
        keep = objectives.scored_positions(batch)
        targets = next_tokens(batch)[keep]
        assert passes.student.last is not None
        assert passes.teacher.last is not None
        metric.update(
            passes.student.last[keep], passes.student_head, passes.teacher.last[keep], passes.teacher_head, targets
        )

    def _log_held_out(self, stage: str) -> None:
        values = {f"{stage}/{name}": value.to(self.device) for name, value in self.held_out.compute().items()}
        self.log_dict(values)
        self.held_out.reset()
