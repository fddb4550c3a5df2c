"""Arguments that are of another kind than they should be, refused in one sentence before anything runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.files import said

MADE = "lcprune.TextDataModule(...).calibration_batches() makes them of text"


def check_kind(name: str, given: object, kind: type, example: str) -> None:
    """Refuses an argument of another kind.

    Args:
        name: Of the argument.
        given: Its value.
        kind: What it has to be an instance of.
        example: What a user could write instead.

    Raises:
        InputError: It is something else, such as the class itself or its name.
    """
    if not isinstance(given, kind):
        raise InputError(f"{name}={_said(given)} must be an instance of {kind.__name__}, such as {example}.")


def check_model(model: object) -> None:
    """Refuses what is no causal LM of transformers with its weights in memory; one that torch has compiled is one."""
    inner = dict(model.named_children()).get("_orig_mod", model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, PreTrainedModel):
        raise InputError(
            f"model={_said(model)} must be a transformers model in memory: load one with "
            "AutoModelForCausalLM.from_pretrained, and of one with adapters give merge_and_unload()."
        )
    if inner.get_output_embeddings() is None:
        raise InputError(
            f"model is a {type(inner).__name__} without a head that predicts tokens: load it with "
            "AutoModelForCausalLM.from_pretrained."
        )
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise InputError(
            "model has weights on the meta device, where there are shapes and no numbers: load it whole with "
            "AutoModelForCausalLM.from_pretrained."
        )


def checked_batches(batches: Iterable[Mapping[str, Tensor]]) -> tuple[Mapping[str, Tensor], ...]:
    """All batches, to be walked through more than once; none are none.

    Raises:
        InputError: One is no mapping with whole numbers `input_ids` [B, T].
    """
    if isinstance(batches, str | Path | Mapping | Tensor) or not isinstance(batches, Iterable):
        raise InputError(f"batches={_said(batches)} must be a list of batches, input_ids [B, T] each: {MADE}.")
    taken = tuple(batches)
    for number, batch in enumerate(taken):
        if fault := _fault(batch):
            raise InputError(f"batches[{number}] {fault}, and must hold input_ids, whole numbers [B, T]: {MADE}.")
    return taken


def _fault(batch: object) -> str | None:
    if not isinstance(batch, Mapping):
        return f"is a {type(batch).__name__}"
    if "input_ids" not in batch:
        return f"holds {', '.join(map(str, batch)) or 'nothing'}"
    ids = batch["input_ids"]
    if not isinstance(ids, Tensor):
        return f"has input_ids in a {type(ids).__name__}"
    if ids.dim() != 2:
        return f"has input_ids of the shape {list(ids.shape)}"
    whole = not (ids.is_floating_point() or ids.is_complex() or str(ids.dtype) == "torch.bool")
    return None if whole else f"has input_ids in {str(ids.dtype).removeprefix('torch.')}"


def _said(given: object) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else said(given)
