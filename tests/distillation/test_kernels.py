"""Liger's kernels compute what torch's do, and leave no trace; those marked `gpu` need liger-kernel beside a GPU."""

import sys
from pathlib import Path

import pytest
import torch

from lcprune.distillation import kernels, liger
from lcprune.distillation.divergences import Divergence
from lcprune.distillation.head import Head, LowRank
from lcprune.distillation.losses import head_loss
from lcprune.errors import InputError
from tests import builders
from tests.distillation import runs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # TRITON_INTERPRET=1 computes on a CPU
N, D, V = 40, 32, 300


@pytest.mark.parametrize(
    ("model_type", "device", "expected"),
    [
        ("opt", "cuda", "no kernels for model_type='opt', only for llama, .* set model.kernels: torch"),
        ("llama", "cuda", r"needs liger-kernel: pip install 'lcprune\[liger\]', or set torch"),
        ("llama", "cpu", "computes on a CUDA GPU, this run on cpu: set model.kernels: torch"),
    ],
)
def test_liger_is_refused_where_it_cannot_compute(
    model_type: builders.Family, device: str, expected: str, monkeypatch: pytest.MonkeyPatch
):
    there = object() if "CUDA" in expected else None
    monkeypatch.setattr(kernels, "find_spec", lambda name: there)
    config = builders.tiny_config(model_type=model_type)
    with pytest.raises(InputError, match=expected):
        kernels.check("liger", config, torch.device(device))
    kernels.check("torch", config, torch.device(device))


def test_run_with_liger_on_a_cpu_is_refused_before_weights_are_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setattr("lcprune.distillation.teacher.load", lambda *_, **__: pytest.fail("weights were loaded"))
    module = runs.student_of(tiny_folder, kernels="liger")
    with pytest.raises(InputError, match="this run on cpu"):
        runs.trainer_for(tmp_path, runs.two_merges()).fit(module, runs.data_for(tiny_folder, runs.write_text(tmp_path)))


@pytest.mark.parametrize(
    ("head", "divergence", "expected"),
    [
        (Head(torch.ones(3, 2)), Divergence(temperature=2.0), None),
        (Head(torch.ones(3, 2)), None, None),
        (Head(torch.ones(3, 2)), Divergence("jsd"), "jsd is not among them"),
        (Head(torch.ones(3, 2), bias_V=torch.ones(3)), None, "the head has a bias"),
        (Head(torch.ones(3, 2), cap=30.0), None, "the family scales or caps its logits"),
        (Head(torch.ones(3, 2), low_rank=LowRank(torch.ones(1, 2), torch.ones(3, 1))), None, "the head has an adapter"),
    ],
)
def test_what_liger_leaves_to_us_has_a_reason(head: Head, divergence: Divergence | None, expected: str | None):
    assert liger.reason_against(head, divergence) == expected


def _loss(kind: str, dtype: torch.dtype, frozen: bool, **settings: float) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    student_ND, teacher_ND = (torch.randn(N, D, generator=chance).to(DEVICE, dtype) for _ in range(2))
    student_VD, teacher_VD = (torch.randn(V, D, generator=chance).to(DEVICE, dtype) / D**0.5 for _ in range(2))
    targets_N = torch.randint(V, (N,), generator=chance).to(DEVICE)
    student_ND.requires_grad_()
    student_VD.requires_grad_(not frozen)
    divergence = Divergence(temperature=settings.pop("temperature", 1.0))
    loss = head_loss(
        student_ND,
        Head(student_VD),
        teacher_ND,
        Head(teacher_VD),
        targets_N=targets_N,
        divergence=divergence,
        kernels=kind,  # type: ignore[arg-type]
        **settings,
    )
    (0.5 * loss.total).backward()
    found = [loss.total.detach(), loss.logits, loss.labels, student_ND.grad]
    return found if frozen else [*found, student_VD.grad]


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [16, 2048])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0, "labels_weight": 0.5},
        {"logits_weight": 0.0, "labels_weight": 1.0},
    ],
)
def test_loss_by_liger_is_ours_in_value_and_gradients(
    settings: dict[str, float], chunk: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(liger, "CHUNK", chunk)
    for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        theirs, ours = (_loss(kind, dtype, frozen, **settings) for kind in ("liger", "torch"))
        for one, other in zip(theirs, ours, strict=True):
            torch.testing.assert_close(one, other, rtol=near, atol=near * float(other.abs().max()) + 1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", kernels.FAMILIES)
def test_layers_by_liger_are_torchs_in_value_and_gradients_and_go_back(model_type: builders.Family):
    pytest.importorskip("liger_kernel")
    model = builders.tiny_llama(model_type=model_type).to(DEVICE)
    classes = dict(vars(sys.modules[type(model).__module__]))
    printed = str(model)
    input_ids = builders.token_batches(1)[0].to(DEVICE)

    def outcome() -> dict[str, torch.Tensor]:
        model.zero_grad()
        output = model(input_ids=input_ids, labels=input_ids)
        output.loss.backward()
        return {"logits": output.logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

    before = outcome()
    take_off = kernels.put_on(model)
    assert "Liger" in str(model)
    assert vars(sys.modules[type(model).__module__]) == classes
    during = outcome()
    take_off()
    assert str(model) == printed
    after = outcome()
    for name, expected in before.items():
        torch.testing.assert_close(during[name], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.gpu
def test_run_with_liger_learns_what_torch_learns(tiny_folder: Path, tmp_path: Path):
    pytest.importorskip("liger_kernel")
    data, losses = runs.write_text(tmp_path), {}
    for kind in kernels.KERNELS:
        torch.manual_seed(0)
        module = runs.student_of(tiny_folder, kernels=kind)
        trainer = runs.trainer_for(tmp_path / kind, runs.two_merges(), accelerator="gpu")
        trainer.fit(module, runs.data_for(tiny_folder, data))
        assert module.history.depth == 4
        assert "Liger" not in str(module.student)
        losses[kind] = trainer.callback_metrics["train/loss"].item()
    assert losses["liger"] == pytest.approx(losses["torch"], rel=1e-2)
