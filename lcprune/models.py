"""A model's name as users write it, and what can be read of the model without its weights.

    demo:smollm2            the demo model, see demo.py
    runs/short, ~/short     a local folder
    owner/name              a model on the hub

Everything that takes a model's name goes through `resolve` first. Remote code is never run. transformers is imported
inside functions.
"""

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from lcprune import demo
from lcprune.demo import DEMO, DEMO_NAME
from lcprune.errors import InputError
from lcprune.files import said

ADAPTER = "adapter_config.json"
"""Where there is one, transformers loads the model that it names instead of the folder's own."""

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase


def name_of(field: str, model: str | Path) -> str:
    """A model's name, of which a path is one.

    Args:
        field: The setting that names it, for the message.
        model: As a user gives it.

    Raises:
        InputError: It is something else, such as a model in memory.
    """
    if isinstance(model, Path):
        return str(model.expanduser())
    if not isinstance(model, str):
        raise InputError(f"{field}={said(model)} must be text or a path: name a local folder, a hub model or {DEMO}.")
    return model


def resolve(model: str) -> str:
    """Turns a model's name as a user writes it into one that transformers can load.

    Args:
        model: `demo:smollm2`, a local folder (`~` is expanded) or a hub name.

    Returns:
        The folder of the unpacked demo model, the local folder, or the hub name as it was.

    Raises:
        InputError: The demo's packages are missing, its folder cannot be written, or a path holds no model.
    """
    if model == DEMO:
        return str(demo.folder())
    path = Path(model).expanduser()
    if not (model.startswith((".", "~", os.sep)) or model.count(os.sep) > 1 or path.exists()):
        return model
    if not (path / "config.json").is_file():
        if (path / ADAPTER).is_file():
            raise InputError(
                f"model {model!r} holds {ADAPTER}, so it is an adapter for another model: merge it into that one "
                "(merge_and_unload, save_pretrained) and name the folder that this makes."
            )
        found = "holds no config.json" if path.is_dir() else "is not a folder" if path.exists() else "does not exist"
        raise InputError(
            f"model {model!r} looks like a local path but {found}: name a folder written by save_pretrained, "
            f"a model on the hub (owner/name), or {DEMO}."
        )
    return str(path)


def located(model: str) -> str:
    """The name by which a local folder is found from any other one, too; any other name as it is."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model and path.is_dir() else model


def public_name(model: str) -> str:
    """What others call a model: the demo model's name on the hub, any other as it is."""
    return DEMO_NAME if model == DEMO else model


@dataclass(frozen=True)
class License:
    """Under what a model may be passed on, as its card on the hub says."""

    license: str
    """The hub's own name of it ("apache-2.0"), or "other"."""
    license_name: str | None = None
    """What another one is called."""
    license_link: str | None = None
    """Where its text is: an address, or a file beside the card."""

    def __str__(self) -> str:
        more = ", ".join(part for part in (self.license_name, self.license_link) if part)
        return f"{self.license} ({more})" if more else self.license

    def fields(self) -> dict[str, object]:
        """Of a model card's front matter."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def license_of(model: str) -> License | None:
    """The licence that a model's card names; None when there is no card that can be read."""
    import yaml
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    if model == DEMO:
        return License("apache-2.0")
    folder = Path(resolve(model))
    try:
        card = folder / "README.md" if folder.is_dir() else Path(hf_hub_download(model, "README.md"))
        told = ModelCard(card.read_text(encoding="utf-8")).data
    except (OSError, HfHubHTTPError, ValueError, yaml.YAMLError):
        return None
    values = {field.name: value for field in fields(License) if isinstance(value := told.get(field.name), str)}
    return License(**values) if "license" in values else None


def read_config(model: str) -> "PretrainedConfig":
    """Reads a model's configuration without its weights; remote code is never run.

    Raises:
        InputError: There is no such model, or transformers does not know its kind.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    name = resolve(model)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, *_UNREADABLE, StrictDataclassError) as error:
        raise _unreadable("configuration", model, error) from error


def read_generation_config(model: str) -> "GenerationConfig | None":
    """Reads how a model is to generate; None where it brings no file of that, or one that transformers passes over.

    Raises:
        InputError: The file says what transformers refuses.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(resolve(model))
    except OSError:
        return None
    except _UNREADABLE as error:
        raise InputError(
            f"generation_config.json of model {model!r} is refused by transformers ({_reason(error)}): correct it, or "
            "delete it and what follows from config.json is taken."
        ) from error


def load_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer that belongs to a model; remote code is never run.

    Raises:
        InputError: There is no such model, or it brings no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    name = resolve(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, *_UNREADABLE) as error:
        raise _unreadable("tokenizer", model, error) from error
    except Exception as error:
        if type(error) is not Exception:  # what the tokenizers library raises for a file that it cannot read
            raise
        raise _unreadable("tokenizer", model, error) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


# What transformers raises for JSON that is whole but means nothing.
_UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, ImportError)


def _unreadable(what: str, model: str, error: Exception) -> InputError:
    if "trust_remote_code" in str(error):
        return InputError(
            f"model {model!r} brings a {what} in code of its own, which lcprune never runs: choose a model of a family "
            "that transformers knows by itself, or convert it to one."
        )
    named = f"a model on the hub (owner/name), a local folder written by save_pretrained, or {DEMO}"
    if Path(resolve(model)).is_dir():
        way_out = f"save or fetch the model anew, or name {named}"
    elif _offline():
        way_out = f"HF_HUB_OFFLINE is set, so only what is in the hub's cache is found: check the name, or name {named}"
    else:
        way_out = f"check the name and the network, or name {named}"
    return InputError(f"model {model!r} has no {what} that could be read ({_reason(error)}): {way_out}.")


def _reason(error: BaseException) -> str:
    while type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None:
        error = error.__cause__  # the outer sentences say which check, the innermost what is wrong
    lines = [line.strip().rstrip(".:").replace(". ", "; ") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
