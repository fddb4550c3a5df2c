"""What only the loading has rounded comes back as it is stored; what was merged or refitted stays."""

from pathlib import Path

import pytest
import torch

from lcprune.distillation.teacher import cast, load
from lcprune.merging import surgery
from lcprune.merging.calibration import Batch
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Operator, WeightedAverage, spec_of
from lcprune.merging.refit import RidgeRefit
from lcprune.merging.rounding import loses_bits, restore
from lcprune.merging.streaming import StoredModel
from lcprune.merging.streams import Stream
from tests.builders import save_tiny, tiny_llama, token_batches


@pytest.mark.parametrize(
    ("loaded", "stored", "expected"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.bfloat16, True),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, False),
    ],
)
def test_bits_are_lost_where_the_type_read_into_does_not_hold_the_other(
    loaded: torch.dtype, stored: torch.dtype, expected: bool
):
    assert loses_bits(loaded, stored) == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("operator", [Drop("last"), WeightedAverage()])
def test_all_but_what_was_merged_or_refitted_is_as_stored(tmp_path: Path, operator: Operator, tied: bool):
    folder = save_tiny(tmp_path / "model", tiny_llama(tied=tied))
    exact = load(str(folder), "float32").state_dict()
    student, teacher = load(str(folder), "bfloat16"), load(str(folder), "bfloat16")
    step = MergeStep((2, 3), spec_of(operator), (0.5, 0.5))
    surgery.apply(student, step)
    history = MergeHistory(6, (step,))
    batches: list[Batch] = [{"input_ids": ids} for ids in token_batches(4, 2, 24)]
    refit = RidgeRefit(layers="merged", projections="mlp", strengths=[0.1])
    refit.refit(Stream(student, batches), Stream(teacher, batches), history.lineage, [2])
    merged = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    restore(student, StoredModel(teacher.config, folder, dtype=torch.float32), history.lineage)
    cast(student, torch.float32)
    for name, tensor in student.state_dict().items():
        rest = name.removeprefix("model.layers.")
        number, _, inside = rest.partition(".")
        average = isinstance(operator, WeightedAverage) and "norm" not in inside  # which keeps a member's norms
        if number == "2" and (inside == "mlp.down_proj.weight" or average):
            expected = [merged[name].float()]
        else:
            ancestors = () if rest == name else history.lineage[int(number)]
            expected = [exact[f"model.layers.{ancestor}.{inside}"] for ancestor in ancestors] or [exact[name]]
        assert any(torch.equal(tensor, each) for each in expected), name
