"""The frozen original, and the student that starts as a second view of it.

The teacher is not a submodule: it is never saved, never optimized, never wrapped. It sits in a plain box that copies
to itself, and is moved by hand. The student is built around the teacher's own tensors, so that as long as a
parameter is not trained nor merged there is one copy of it in memory; surgery gives a merged parameter its own.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lcprune import models, weights
from lcprune.distillation import adapters, quantized
from lcprune.distillation.head import Head
from lcprune.distillation.passes import Call, States, Wanted, calls_without_running, forward
from lcprune.distillation.quantized import Packed
from lcprune.errors import InputError
from lcprune.merging.architectures import check_config, layout_of
from lcprune.merging.calibration import HEAD_FIELDS, Batch
from lcprune.merging.streaming import without_weights
from lcprune.merging.surgery import second_view as second_view

DtypeName = Literal["float32", "bfloat16", "float16"]
"""Names of the floating-point types that weights can be held in."""
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)
TeacherDtype: TypeAlias = Literal["auto"] | DtypeName | Packed
"""What a teacher's weights can be held in."""
TEACHER_DTYPES: tuple[TeacherDtype, ...] = ("auto", *DTYPES, *get_args(Packed))


class Teacher:
    """A box around the original model that Lightning does not see."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, object]) -> "Teacher":
        return self

    def __call__(self, batch: Batch, wanted: Wanted = Wanted()) -> States:  # noqa: B008 - frozen
        """What is wanted of a pass, without gradients and in its own dtype; nothing runs where nothing is wanted."""
        if wanted.nothing:
            return States(None)
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            return forward(self.model, batch, wanted)

    def calls(self, batch: Batch, layers: Sequence[int]) -> dict[int, Call]:
        """How it would call these layers, in its own dtype, without running any."""
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            return calls_without_running(self.model, batch, layers)

    @property
    def head(self) -> Head:
        """What turns its last states into logits."""
        return head_of(self.model)


def head_of(model: PreTrainedModel) -> Head:
    """What turns last states into logits, sharing the model's tensors; `calibration.logits` computes the same.

    Raises InputError for an output layer that is not a plain linear one.
    """
    layer, adapter = adapters.taken_apart(model.get_output_embeddings())
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise InputError(
            f"model_type={model.config.model_type!r} has a {type(layer).__name__} as its output layer, which the "
            "distillation losses do not compute: merge without training (lcprune collapse, with a refit)."
        )
    factor, divisor, cap = (getattr(model.config, name, None) for name in HEAD_FIELDS)
    scale = (1.0 if factor is None else factor) / (1.0 if divisor is None else divisor)
    return Head(layer.weight, layer.bias, scale=scale, cap=cap, low_rank=adapter)


def load(
    name: str,
    dtype: DtypeName,
    device: torch.device | str = "cpu",
    packed: Packed | None = None,
    *,
    named: str = "model.teacher",
) -> PreTrainedModel:
    """The model of that name or folder, on `device`.

    Raises InputError if there is none, its family is unknown, its weights are not those that were exported, or
    transformers refuses its generation_config.json.

    Args:
        name: Hub name or folder.
        dtype: Type of its weights, and with `packed` of what is not packed.
        device: Where to.
        packed: Its layers' weights in fewer bits.
        named: The setting that names it, for the error.
    """
    config = models.read_config(name)
    layout_of(config)
    check_config(config, f"{named}={name!r}")
    models.read_generation_config(name)
    kind = getattr(torch, dtype)
    model = weights.load(
        name,
        named,
        dtype=kind,
        device_map={"": torch.device(device)},
        quantization_config=None if packed is None else quantized.config_for(packed, kind),
    )
    quantized.settle(model)
    return model


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives every parameter another dtype, keeping its identity, and unsaved buffers what a model loaded in it has.

    Not `model.to(dtype)`, which would round the rotary frequencies too, and leave a scale of Gemma's embeddings that
    was rounded when the model was loaded as it is.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():  # others are packed
            parameter.data = parameter.data.to(dtype)
    saved, exact = model.state_dict().keys(), dict(without_weights(model.config, dtype).named_buffers())
    for name, buffer in model.named_buffers():
        if name in exact.keys() - saved:
            buffer.data = exact[name].to(buffer.device)


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype in which the original's weights are stored, and in which its student should be.

    Args:
        config: The original's, from `weights.config_of`, which looks at its files.
    """
    dtype = config.dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")


def restore_buffers(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Gives the student's buffers the teacher's precision, and the values that they had in it."""
    exact = dict(teacher.named_buffers())
    for name, buffer in student.named_buffers():
        if buffer.dtype != exact[name].dtype:
            buffer.data = exact[name].to(buffer.device, copy=True)


def recompute_activations(model: PreTrainedModel) -> None:
    """Keeps only the layers' inputs of a forward pass in training, and computes the rest again on the way back."""
    # transformers renamed it in version 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
