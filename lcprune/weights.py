"""What is looked at before and behind the loading of a model's weights.

Which files hold them: safetensors beside its config, and nothing that they point to elsewhere.

    model.safetensors                   or
    model.safetensors.index.json        names the files beside it, and those only

Pickled weights (pytorch_model.bin) are never opened: to read one is to run what its author has put into it, and where
that is prevented nothing is gained over a file that cannot hold code.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcprune.errors import InputError, reason
from lcprune.identity import check_exported
from lcprune.models import ADAPTER, read_config, resolve

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
"""Bytes, as in safetensors."""
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # by their names in a header


def check(model: str, named: str = "model.teacher") -> None:
    """Looks at a model's folder before anything of it is loaded; a model of the hub is fetched as safetensors alone.

    Args:
        model: Hub name, folder or demo:smollm2.
        named: The setting that names it, for the error.

    Raises:
        InputError: Its weights are not whole safetensors files inside its folder, or not those that were exported.
    """
    folder = Path(resolve(model))
    if not folder.is_dir():
        return
    if (folder / ADAPTER).exists():
        raise InputError(
            f"{named}={model!r} holds {ADAPTER}, so it is an adapter for another model: merge it into that one "
            "(merge_and_unload, save_pretrained) and name the folder that this makes."
        )
    try:
        for file in files_of(folder):
            header_of(file)
        check_exported(folder)
    except InputError as error:
        raise InputError(f"{named}: {error}") from error


def load(name: str, named: str, **options: object) -> "PreTrainedModel":
    """A causal LM out of safetensors files; code of its own is never run, and nothing it lacks is made up.

    Args:
        name: Hub name, folder or demo:smollm2.
        named: The setting that names it, for the error.
        options: To `from_pretrained`: dtype, device_map ...

    Raises:
        InputError: There are no weights, not all of them, or others than were exported.
        ValueError: transformers knows no causal LM of this kind.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check(name, named)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(name),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are told of, too
            output_loading_info=True,
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"The weights of {named}={name!r} cannot be loaded ({reason(error)}): save or fetch the model anew."
        ) from error
    model: PreTrainedModel = loaded[0]
    check_loaded(model, loaded[1], f"{named}={name!r}")
    return model


def check_loaded(model: "PreTrainedModel", found: Mapping[str, Iterable[object]], named: str) -> None:
    """Refuses what transformers makes up where the files hold nothing that fits, and numbers that are none.

    Args:
        model: As it was loaded, with `ignore_mismatched_sizes`.
        found: What `output_loading_info` told of it.
        named: The setting that names it, and its value.

    Raises:
        InputError: A tensor is missing or of another shape, or holds a number that is not finite.
    """
    mismatched = (str(each[0]) for each in found["mismatched_keys"])  # type: ignore[index]
    made_up = sorted({*map(str, found["missing_keys"]), *mismatched})
    if made_up:
        raise InputError(
            f"The weights of {named} lack {len(made_up)} of the tensors that its config.json asks for, or hold them in "
            f"another shape, first {made_up[0]}: save or fetch the model anew."
        )
    broken = next((name for name, parameter in model.named_parameters() if not _is_finite(parameter)), None)
    if broken is not None:
        raise InputError(
            f"The weights of {named} hold numbers that are not finite, first in {broken}: save or fetch the model "
            "anew, or choose another dtype if they are too large for this one."
        )


def _is_finite(tensor: "Tensor") -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # of eight bits torch finds no extremes
    return all(bool(extreme.isfinite()) for extreme in wide.aminmax())


def header_of(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """What a safetensors file says it holds; nothing is mapped, which would count against a limit of memory.

    Returns:
        Where its data begin, in bytes, and by tensor `dtype`, `shape` and `data_offsets` (begin, end; from there).

    Raises:
        InputError: It is none, or not as long as it says.
    """
    try:
        with file.open("rb") as content:
            size, length = file.stat().st_size, int.from_bytes(content.read(8), "little")
            text = content.read(min(length, LONGEST_HEADER))
    except OSError as error:
        raise _not_whole(file, str(error)) from error
    if len(text) < length:
        raise _not_whole(file, "its header is cut off")
    try:
        header = json.loads(text)
        tensors = {
            name: {field: held[field] for field in ("dtype", "shape", "data_offsets")}
            for name, held in header.items()
            if name != "__metadata__"
        }
        expected = 8 + length + max((held["data_offsets"][1] for held in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"{file} is not a safetensors file ({error}): fetch or save it again.") from error
    if expected != size:
        raise _not_whole(file, f"{expected:,} bytes by its header, {size:,} on the disk")
    return 8 + length, tensors


def _not_whole(file: Path, why: str) -> InputError:
    return InputError(f"{file} is no whole safetensors file ({why}): fetch or save it again.")


def folder_of(model: str) -> Path:
    """Where a model's files lie: its folder, for one of the hub that of its cache once it has been loaded.

    Args:
        model: Hub name, folder or demo:smollm2.
    """
    folder = Path(resolve(model))
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return Path(found).parent if isinstance(found, str) else folder


def config_of(model: str) -> "PretrainedConfig":
    """`models.read_config`, with the dtype that most tensors of its files have, where these are at hand.

    A config.json may lack its dtype, or name another one than the files that lie beside it hold.

    Args:
        model: Hub name, folder or demo:smollm2.

    Raises:
        InputError: There is no such model, or transformers does not know its kind.
    """
    import torch

    config = read_config(model)
    try:
        headers = [header_of(file)[1] for file in files_of(folder_of(model))]
    except InputError:  # `check` says so where they are to be loaded
        return config
    counted = Counter(str(held["dtype"]) for tensors in headers for held in tensors.values())
    found = _DTYPES.get(max(counted, key=counted.__getitem__, default=""))
    whole = isinstance(config.dtype, torch.dtype) and not config.dtype.is_floating_point  # which `check_config` refuses
    if found is not None and not whole:
        config.dtype = getattr(torch, found)
    return config


def size_of(folder: Path) -> int:
    """Bytes of the weights in a model's folder; 0 = there are none. Copies in other formats do not count."""
    try:
        return sum(file.stat().st_size for file in files_of(folder))
    except InputError:
        return 0


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder.

    Raises:
        InputError: It holds none, or its index names files that are missing or lie elsewhere.
    """
    index = folder / INDEX
    if (folder / ONE_FILE).is_file():
        return [folder / ONE_FILE]
    if not index.is_file():
        pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
        found = f"only pickled weights ({pickled[0]})" if pickled else f"neither {ONE_FILE} nor {INDEX}"
        raise InputError(
            f"the folder {folder} holds {found}, and weights are read from safetensors files alone: load the model "
            "where you trust it and save it with save_pretrained, or choose one stored so."
        )
    names = _names_in(index)
    elsewhere = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if elsewhere:
        raise InputError(f"{index} names {elsewhere[0]!r}, no safetensors file beside it: fetch the model again.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{index} names {len(missing)} files that are not there, first {missing[0]}: fetch them.")
    return [folder / name for name in names]


def _names_in(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if names and all(isinstance(name, str) for name in names):
            return sorted(names)
        reason = "weight_map must map tensors to names of files"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise InputError(f"{index} is not an index of safetensors files ({reason}): fetch the model again.")
