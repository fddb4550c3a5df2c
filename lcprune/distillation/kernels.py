"""Whose kernels a run computes with: torch's, or Liger's on a GPU, which are put on and taken off again.

On the way through the layers Liger (arXiv:2410.10989) computes a norm, and the gate of an MLP, in one kernel each, and
keeps less for the way back. Positions stay torch's: Liger replaces those for all models of the process. The loss stays
ours: Liger's takes the teacher's probabilities whole and is slower (README, Training).
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PretrainedConfig, PreTrainedModel

from lcprune.errors import InputError

Kernels = Literal["torch", "liger"]
KERNELS: tuple[Kernels, ...] = get_args(Kernels)
_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3"), _SILU),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _GELU),
}
"""Those of ours that Liger has kernels for -> the activations that it computes them with; experts are left out."""


def check(kernels: Kernels, config: PretrainedConfig, device: torch.device) -> None:
    """Raises InputError if a run cannot compute with these kernels.

    Args:
        kernels: As model.kernels.
        config: The teacher's.
        device: Where the run computes.
    """
    if kernels == "torch":
        return
    if config.model_type not in FAMILIES:
        raise InputError(
            f"model.kernels=liger has no kernels for model_type={config.model_type!r}, only for "
            f"{', '.join(FAMILIES)}: set model.kernels: torch."
        )
    gate = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    gates = FAMILIES[config.model_type]
    if gate not in gates:
        raise InputError(
            f"model.kernels=liger computes {config.model_type} with {' or '.join(gates)}, and this model has {gate}: "
            "set model.kernels: torch."
        )
    if find_spec("liger_kernel") is None:
        raise InputError("model.kernels=liger needs liger-kernel: pip install 'lcprune[liger]', or set torch.")
    if device.type != "cuda":
        raise InputError(
            f"model.kernels=liger computes on a CUDA GPU, this run on {device.type}: set model.kernels: torch."
        )


def put_on(*models: PreTrainedModel) -> Callable[[], None]:
    """Lets Liger compute models' norms and MLPs.

    Args:
        models: Of FAMILIES; their weights stay as they are.

    Returns:
        What takes the kernels off again, as models that move to a CPU need it.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    before = [(module, set(vars(module))) for model in models for module in model.modules()]
    for model in models:
        classes = vars(sys.modules[type(model).__module__])
        names = dict(classes)
        _apply_liger_kernel_to_instance(model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
        classes.update(names)  # the classes of models that are made later it has replaced too
    added = [(module, set(vars(module)) - known) for module, known in before]
    rank_zero_info("model.kernels=liger: norms and MLPs of student and teacher by liger-kernel")

    def take_off() -> None:
        for module, attributes in added:
            for name in attributes:
                vars(module).pop(name, None)

    return take_off
