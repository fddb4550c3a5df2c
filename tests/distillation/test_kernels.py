"""Liger's kernels compute what torch's do, and leave no trace; those marked `gpu` need liger-kernel beside a GPU."""

import pickle
import sys
from pathlib import Path

import pytest
import torch

from lcprune.distillation import kernels
from lcprune.errors import InputError
from tests import builders
from tests.distillation import runs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # TRITON_INTERPRET=1 computes on a CPU


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


def test_model_whose_activation_liger_does_not_compute_is_refused():
    config = builders.tiny_config()
    config.hidden_act = "relu"
    with pytest.raises(InputError, match="with silu or swish, and this model has relu: set"):
        kernels.check("liger", config, torch.device("cuda"))


def test_module_can_be_handed_to_another_process(tiny_folder: Path):
    assert pickle.loads(pickle.dumps(runs.student_of(tiny_folder))).kernels == "torch"


def test_run_with_liger_on_a_cpu_is_refused_before_weights_are_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setattr("lcprune.distillation.teacher.load", lambda *_, **__: pytest.fail("weights were loaded"))
    module = runs.student_of(tiny_folder, kernels="liger")
    with pytest.raises(InputError, match="this run on cpu"):
        runs.trainer_for(tmp_path, runs.two_merges()).fit(module, runs.data_for(tiny_folder, runs.write_text(tmp_path)))


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
    data, found = runs.write_text(tmp_path), {}
    for kind in kernels.KERNELS:
        torch.manual_seed(0)
        module = runs.student_of(tiny_folder, kernels=kind, optimizer=runs.SGD, lr_scheduler=None)
        trainer = runs.trainer_for(tmp_path / kind, runs.two_merges(), accelerator="gpu")
        trainer.fit(module, runs.data_for(tiny_folder, data))
        assert module.history.depth == 4
        assert "Liger" not in str(module.student)
        found[kind] = runs.weights_of(module)
    for name, weight in found["torch"].items():
        torch.testing.assert_close(found["liger"][name], weight, rtol=1e-2, atol=1e-3)
