"""Which model this is, by what is in it: the same under another name, another once a weight has changed."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from lcprune import models
from lcprune.errors import InputError
from lcprune.files import hash_of, sha256_of, write_text

CHECKSUMS = "SHA256SUMS"
"""In an exported folder, the hash of every file of weights; `sha256sum -c SHA256SUMS` reads it, too."""
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\]*\.safetensors)")  # * where sha256sum read it as binary
_HISTORY = "history.json"  # as in merging/lineage.py, which lies above
_DECIDING = {".json", ".safetensors", ".bin", ".model", ".txt"}  # weights, config and tokenizer; no README
_ACCOUNTS = {_HISTORY, "evaluation.json", "figures.json", "scores.json"}  # what lcprune writes about a model


def content_of(model: str) -> str:
    """The hash of everything in a model's folder that decides what it says; a hub model's name and commit."""
    return _content_of(model, lambda file: file.suffix in _DECIDING and file.name not in _ACCOUNTS)


def weights_of(model: str) -> str:
    """The hash of a model's config and weights; a hub model's name and commit."""
    return _content_of(model, lambda file: file.name == "config.json" or file.suffix in (".safetensors", ".bin"))


def write_checksums(folder: Path) -> None:
    """Writes down what the weights (*.safetensors) of a folder are."""
    lines = (f"{sha256_of(file)}  {file.name}\n" for file in sorted(folder.glob("*.safetensors")))
    write_text(folder / CHECKSUMS, "".join(lines))


def check_exported(folder: Path) -> None:
    """Refuses weights that are not those that were exported; without SHA256SUMS there is nothing to check.

    Beside a history the list is ours and names every file of weights; in a list of others, lines that name none that is
    here say nothing. Hashes of large files are remembered while their size and time stay, so that only the first look
    takes long.

    Raises:
        InputError: A file of weights is missing, cut off or changed.
    """
    listed = folder / CHECKSUMS
    if not listed.is_file():
        return
    lines = listed.read_text(encoding="utf-8", errors="replace").split("\n")
    sums = {known[2]: known[1] for line in lines if (known := _LINE.fullmatch(line))}
    here = {file.name for file in folder.glob("*.safetensors")}
    names = here | sums.keys() if (folder / _HISTORY).is_file() else here & sums.keys()
    for file in (folder / name for name in sorted(names)):
        if not file.is_file():
            found = "is missing"
        elif hash_of(file) != sums.get(file.name):
            found = "is not as it was exported"
        else:
            continue
        raise InputError(
            f"{file} {found} (SHA-256 by {CHECKSUMS}): fetch or export the model anew, or delete {listed} if you "
            "changed the weights on purpose."
        )


def vocabulary_of(model: str) -> str:
    """The hash of what every token id of a model's tokenizer stands for."""
    words = sorted(models.load_tokenizer(model).get_vocab().items())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _content_of(model: str, decides: Callable[[Path], bool]) -> str:
    folder = Path(models.resolve(model))
    if not folder.is_dir():
        return f"{model}@{models.read_config(model)._commit_hash}"
    lines = [f"{file.name} {hash_of(file)}" for file in sorted(folder.iterdir()) if decides(file)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
