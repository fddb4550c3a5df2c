"""Which files hold a model's weights: safetensors beside its config, and nothing that they point to elsewhere.

    model.safetensors                   or
    model.safetensors.index.json        names the files beside it, and those only

Pickled weights (pytorch_model.bin) are never opened: to read one is to run what its author has put into it, and where
that is prevented nothing is gained over a file that cannot hold code.
"""

import json
from pathlib import Path

from lcprune.demo import resolve
from lcprune.errors import InputError

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
"""Where there is one, transformers loads the model that it names instead of the folder's own."""


def check(model: str, named: str = "model.teacher") -> None:
    """Looks at a model's folder before anything of it is loaded; a model of the hub is fetched as safetensors alone.

    Args:
        model: Hub name, folder or demo:smollm2.
        named: The setting that names it, for the error.

    Raises:
        InputError: If there is no such folder, or its weights are not whole safetensors files inside it.
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
            _check_whole(file)
    except InputError as error:
        raise InputError(f"{named}: {error}") from error


def _check_whole(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):  # reads the header and compares it with the file's length
            return
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is no whole safetensors file ({error}): fetch or save it again.") from error


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
