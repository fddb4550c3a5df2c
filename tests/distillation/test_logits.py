"""The level `Logits`: what it refuses, and that every divergence and every head is what it says, on real models."""

import pytest
import torch
from torch import Tensor

from lcprune.distillation.divergences import Divergence
from lcprune.distillation.levels import Logits
from lcprune.distillation.objectives import objective, run, scored_positions
from lcprune.distillation.teacher import Teacher, second_view
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeHistory, MergeStep
from tests import builders
from tests.distillation import heads

MERGED = MergeHistory(6, (MergeStep((1, 2, 3), {"class_path": "Drop"}, (1.0, 0.0, 0.0)),))
FORMULAS = [
    (Logits(), Divergence()),
    (Logits(temperature=2.0, divergence="reverse_kl"), Divergence("reverse_kl", 2.0)),
    (Logits(divergence="skew_kl"), Divergence("skew_kl", share=0.1)),
    (Logits(divergence="jsd", beta=0.8), Divergence("jsd", share=0.8)),
]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": 0}, "temperature=0 must be positive"),
        ({"divergence": "kl"}, "divergence='kl' must be one of forward_kl, reverse_kl, jsd, skew_kl"),
        ({"divergence": "skew_kl", "skew": 1.0}, r"skew=1\.0 must lie between 0 and 1"),
        ({"divergence": "jsd", "beta": 0.0}, r"beta=0\.0 must lie between 0 and 1"),
        ({"skew": 0.2}, r"skew=0\.2 counts for divergence=skew_kl only, not for 'forward_kl'"),
        ({"divergence": "skew_kl", "beta": 0.2}, r"beta=0\.2 counts for divergence=jsd only, not for 'skew_kl'"),
        ({"temperature": -1, "skew": 2}, "temperature=-1 must be positive; skew=2 must lie"),
    ],
)
def test_logits_refuse_a_setting_that_means_nothing(wrong: dict[str, float | str], said: str):
    with pytest.raises(InputError, match=said):
        Logits(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
@pytest.mark.parametrize(("level", "formula"), FORMULAS, ids=[level.divergence for level, _ in FORMULAS])
def test_logits_are_the_divergence_that_they_name(
    batch: dict[str, Tensor], family: builders.Family, level: Logits, formula: Divergence
):
    # phi has a bias in its head, gemma2 a soft cap.
    assert level.formula == formula
    teacher = builders.tiny_llama(model_type=family)
    student = second_view(teacher)
    surgery.apply_all(student, MERGED.steps)
    batch["labels"][0, :5] = -100
    keep = scored_positions(batch)
    passes = run((level,), batch, student, Teacher(teacher), MERGED.lineage)
    loss = objective((level,), passes, MERGED.lineage)["loss"]
    loss.backward()
    ours = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    theirs = teacher(batch["input_ids"]).logits[keep].detach()
    plain = heads.distance(student(batch["input_ids"]).logits[keep], theirs, formula).mean() * formula.temperature**2
    torch.testing.assert_close(loss, plain)
    plain.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
