"""The gradient is that of the mean over all tokens, however they are split."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lcprune import Boundary, Labels, Logits
from lcprune.distillation import accumulation
from lcprune.distillation.accumulation import TokenWindow
from tests.builders import VOCABULARY
from tests.distillation import runs


def test_weighed_micro_batches_add_up_to_the_mean_over_tokens():
    weight = torch.nn.Parameter(torch.ones(()))
    window, counts, values = TokenWindow(), [3, 1, 0, 4], [2.0, 10.0, 0.0, 5.0]
    for count, value in zip(counts, values, strict=True):
        (window.weigh(weight * value, count) / len(counts)).backward()
    window.close(len(counts), [weight])
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx((3 * 2 + 1 * 10 + 4 * 5) / 8)


def test_equal_micro_batches_are_left_to_lightning():
    weight = torch.nn.Parameter(torch.ones(()))
    window, loss = TokenWindow(), weight * 2
    assert window.weigh(loss, 8) is loss
    loss.backward()
    gradient = weight.grad
    window.close(1, [weight])
    assert weight.grad is gradient


def test_ranks_meet_once_at_a_windows_start_and_once_at_its_end_whatever_is_scored(monkeypatch: pytest.MonkeyPatch):
    met: list[float] = []
    monkeypatch.setattr(accumulation, "_over_ranks", lambda value, device: met.append(value) or value)
    weight, window = torch.nn.Parameter(torch.ones(())), TokenWindow()
    for _ in range(2):
        for count in (0, 5, 0):
            (window.weigh(weight * 2, count) / 3).backward()
        window.close(3, [weight])
    assert met == [0.0, 5.0, 0.0, 5.0]
    assert weight.grad is not None
    # The second window's closing factor, 3 * 1 / 5, counts for what the first has left, too: nobody zeroed it.
    assert weight.grad.item() == pytest.approx((2.0 + 2.0 * 5 / 3) * 3 / 5)


class Rows(LightningDataModule):
    """Eight rows whose answers have different lengths, and text to plan by."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        ids = torch.randint(5, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0))
        labels = torch.where(torch.arange(12) >= torch.tensor([2, 11, 4, 1, 9, 6, 10, 3])[:, None], ids, -100)
        self.rows = list(zip(ids, labels, strict=True))

    def calibration_batches(self) -> list[dict[str, Tensor]]:
        return [{"input_ids": ids[None]} for ids, _ in self.rows]

    def train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        def batch(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
            return {"input_ids": torch.stack([r[0] for r in rows]), "labels": torch.stack([r[1] for r in rows])}

        return DataLoader(self.rows, batch_size=self.batch_size, collate_fn=batch)

    val_dataloader = train_dataloader


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 8), (2, 4)])
def test_one_by_eight_equals_eight_by_one(tiny_folder: Path, tmp_path: Path, batch_size: int, accumulate: int):
    trajectories = []
    for size, number in ((8, 1), (batch_size, accumulate)):
        module = runs.student_of(
            tiny_folder, objective=[Logits(), Boundary(0.5), Labels(0.2)], lr_scheduler=None, optimizer=runs.SGD
        )
        trainer = runs.trainer_for(
            tmp_path,
            runs.two_merges(),
            max_steps=9,
            accumulate_grad_batches=number,
            gradient_clip_val=0.5,
        )
        trainer.fit(module, datamodule=Rows(size))
        trajectories.append(runs.weights_of(module))
    for name, weight in trajectories[0].items():
        torch.testing.assert_close(trajectories[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)
