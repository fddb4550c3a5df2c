"""What was rounded when a model was loaded in fewer bits than it is stored in, and nothing else, as it is stored."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.merging.lineage import Lineage
from lcprune.merging.streaming import StoredModel


def loses_bits(loaded: torch.dtype, stored: torch.dtype) -> bool:
    """Whether weights stored in one type are rounded by being loaded in another."""
    return torch.promote_types(loaded, stored) != loaded


def restore(student: PreTrainedModel, stored: StoredModel, lineage: Lineage) -> None:
    """Gives every parameter that is the original's but for rounding the original's values, and their dtype.

    What merges and refits have changed stays as it is: it differs from the rounded original. Memory: one tensor more.

    Args:
        student: The merged model, on whatever device.
        stored: The original, in the dtype that it is stored in.
        lineage: Original layers of every student layer.
    """
    layers = stored.layout.layers_of(student)
    inside = {id(parameter) for parameter in layers.parameters()}
    for name, parameter in student.named_parameters():
        if id(parameter) not in inside:
            _restore(parameter, [stored.tensor(name)])
    for layer, ancestors in zip(layers, lineage, strict=True):
        originals = [stored.layer(index) for index in ancestors]
        for name, parameter in layer.named_parameters():
            _restore(parameter, (original[name] for original in originals))


def _restore(parameter: nn.Parameter, originals: Iterable[Tensor]) -> None:
    for original in originals:
        exact = original.to(parameter.device)
        if exact.shape == parameter.shape and torch.equal(exact.to(parameter.dtype), parameter.data):
            parameter.data = exact
            return
