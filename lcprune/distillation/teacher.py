"""The frozen original, and the student that starts as a second view of it.

The teacher is not a submodule: it is never saved, never optimized, never wrapped. It sits in a plain box that copies
to itself, and is moved by hand. The student is built around the teacher's own tensors, so that as long as a
parameter is not trained nor merged there is one copy of it in memory; surgery gives a merged parameter its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lcprune import demo
from lcprune.errors import InputError
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import HEAD_FIELDS, Batch, hidden_states, layer_outputs
from lcprune.merging.surgery import second_view as second_view

DtypeName = Literal["float32", "bfloat16", "float16"]
"""Names of the floating-point types that weights can be held in."""
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)


@dataclass(frozen=True)
class States:
    """What one forward pass is asked for."""

    last: Tensor
    """State [B, T, D] after the final norm."""
    layers: dict[int, Tensor]
    """Layer index -> its output [B, T, D]."""


class Teacher:
    """A box around the original model that Lightning does not see."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, object]) -> "Teacher":
        return self

    def __call__(self, batch: Batch, layers: Sequence[int] = ()) -> States:
        """The teacher's states, without gradients and in its own dtype."""
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            return forward(self.model, batch, layers)

    @property
    def head(self) -> Tensor:
        """Weight [V, D] of the output embeddings."""
        return head_weight(self.model)


def forward(model: PreTrainedModel, batch: Batch, layers: Sequence[int] = ()) -> States:
    """Last state and the outputs of chosen layers, of any causal LM of a known family, without its head."""
    with layer_outputs(layout_of(model.config).layers_of(model), layers) as states:
        last = hidden_states(model, batch)
    return States(last, states)


def head_weight(model: PreTrainedModel) -> Tensor:
    """Weight [V, D] that turns last states into logits; raises InputError for a head that does more than that."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    more = [f"{name}={value}" for name in HEAD_FIELDS if (value := getattr(model.config, name, None)) is not None]
    more += ["a bias"] if head.bias is not None else []
    if more:
        raise InputError(
            f"model_type={model.config.model_type!r} has a head with {', '.join(more)}, which the distillation losses "
            "do not compute: merge it without training (lcprune collapse, with a refit) or choose another model."
        )
    return head.weight


def load(name: str, dtype: DtypeName, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model of that name or folder, on `device`; raises InputError if there is none or its family is unknown."""
    layout_of(demo.read_config(name))
    try:
        return AutoModelForCausalLM.from_pretrained(
            demo.resolve(name), dtype=getattr(torch, dtype), device_map={"": torch.device(device)}
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"The weights of model.teacher={name!r} cannot be loaded ({reason})") from error


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives every parameter another dtype, keeping its identity.

    Not `model.to(dtype)`, which would round the rotary frequencies too.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype in which the original's weights are stored, and in which its student should be."""
    dtype = config.dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")


def own(parameter: nn.Parameter) -> None:
    """Gives a parameter storage of its own, keeping its identity."""
    parameter.data = parameter.data.clone()
