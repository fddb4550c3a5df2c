"""Tokens of a text, made once and kept in the user's cache folder.

    CACHE/tokens/HASH.safetensors     stream, learned, lengths (tokens.py) and a checksum of them

The hash is that of everything the tokens follow from: the documents, the tokenizer, the chat template, what is learned.
A file that is damaged, or that cannot be written, costs the time to tokenise again and nothing else. Small texts are
not kept.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lcprune.data.chat import Learn
from lcprune.data.columns import Documents
from lcprune.data.tokens import Tokens
from lcprune.files import cache_folder, write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST = 1_000_000
"""Characters of a text that is worth a file: about a second's work."""
_FORMAT = 3  # raised when the same documents come to give other tokens


def kept(
    documents: Documents,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: Path | None,
    learn: Learn,
    make: Callable[[], Tokens],
) -> Tokens:
    """The tokens of these documents: those that are kept, or else newly made and kept.

    Args:
        documents: What is tokenised.
        tokenizer: By what.
        template: A file with a chat template instead of the tokenizer's own.
        learn: What of a conversation is learned.
        make: Makes them.
    """
    if not tokenizer.is_fast or _characters(documents) < LEAST:  # a slow tokenizer does not show what it does
        return make()
    source = tokenizer.chat_template if template is None else template.read_text(encoding="utf-8")
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}  # templates write them
    how = [_FORMAT, documents.kind, learn, source, special, tokenizer.backend_tokenizer.to_str()]
    path = cache_folder() / "tokens" / f"{_hash(how, documents)}.safetensors"
    tokens = _read(path)
    if tokens is None:
        tokens = make()
        with suppress(OSError):
            _write(path, tokens)
    return tokens


def _characters(documents: Documents) -> int:
    return sum(map(len, documents.texts)) + sum(
        len(message["content"]) for conversation in documents.conversations for message in conversation
    )


def _hash(how: list[object], documents: Documents) -> str:
    digest = hashlib.sha256(json.dumps(how).encode())
    items: Iterable[object] = documents.texts if documents.kind == "text" else map(list, documents.conversations)
    for item in items:
        digest.update(json.dumps(item).encode())  # quoted, so that it ends where the next begins
    return digest.hexdigest()[:32]


def _write(path: Path, tokens: Tokens) -> None:
    tensors = {"stream": tokens.stream, "learned": tokens.learned, "lengths": tokens.lengths}
    write_bytes(path, save(tensors, {"sha256": _checksum(tokens)}))


def _read(path: Path) -> Tokens | None:
    """What is kept; None where there is nothing whole."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tokens = Tokens(*(file.get_tensor(name) for name in ("stream", "learned", "lengths")))
            return tokens if (file.metadata() or {}).get("sha256") == _checksum(tokens) else None
    except (SafetensorError, OSError):
        return None


def _checksum(tokens: Tokens) -> str:
    digest = hashlib.sha256()
    for tensor in (tokens.stream, tokens.learned, tokens.lengths):
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
