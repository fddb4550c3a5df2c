"""An exported folder on the Hugging Face hub: whether it can go there is asked first, then it goes at once."""

from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from lcprune.delivery.export import RECIPE
from lcprune.errors import InputError, RunError, reason
from lcprune.merging.lineage import HISTORY

ACCOUNTS = (RECIPE, HISTORY, "evaluation.json")
"""Files of an export that say how it was made, with the paths that were typed."""
# OSError and the base class of whatever HTTP library this version of huggingface_hub is built on.
UNREACHABLE: tuple[type[Exception], ...] = HfHubHTTPError.__bases__  # type: ignore[assignment]


def check(name: str) -> None:
    """Raises InputError unless this user can upload a model of that name now; to be called before any work.

    Args:
        name: owner/name on the hub, or a name of the user's own.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {name} is no name for the hub ({error}): give owner/name.") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"--push-to-hub {name} needs the hub, and HF_HUB_OFFLINE is set: unset it, or export to a folder."
        )
    if get_token() is None:
        raise InputError(f"--push-to-hub {name} needs you to be logged in: run `hf auth login`, or set HF_TOKEN.")
    try:
        HfApi().whoami()
    except UNREACHABLE as error:
        raise InputError(
            f"--push-to-hub {name}: the hub does not let you in ({reason(error)}): check the network and your token "
            "(`hf auth login`)."
        ) from error


def local_paths(folder: Path) -> dict[str, str]:
    """By file of an export that names places of this machine, the first of them."""
    contents = {name: folder / name for name in ACCOUNTS if (folder / name).is_file()}
    # YAML reads JSON, too.
    found = {name: list(_paths(yaml.safe_load(file.read_text("utf-8")))) for name, file in contents.items()}
    return {name: paths[0] for name, paths in found.items() if paths}


def _paths(content: object) -> Iterator[str]:
    if isinstance(content, str) and content.startswith(("/", "~/")):
        yield content
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    for each in inner:
        yield from _paths(each)


def push(folder: Path, name: str) -> str:
    """Uploads a folder as one commit; a repository that is not there yet is made, and made private.

    Args:
        folder: An export.
        name: As `check` has accepted it.

    Returns:
        The address of the model.

    Raises:
        RunError: The upload broke off; the folder is whole and can be pushed again.
    """
    try:
        made = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message=f"{folder.name}, exported by lcprune"
        )
    except UNREACHABLE as error:
        raise RunError(
            f"The upload to {name} failed ({reason(error)}); {folder} is whole: run "
            f"`lcprune export {folder} --push-to-hub {name}` again."
        ) from error
    return str(made)
