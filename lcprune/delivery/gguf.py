"""An exported folder as one GGUF file, by llama.cpp's own converter, which is found and not carried along.

    LLAMA_CPP=~/llama.cpp        a checkout, or its convert_hf_to_gguf.py
    PATH                         convert_hf_to_gguf.py, as packages of llama.cpp install it

A shortened model is a plain one of its family, so that the converter needs to know nothing of lcprune. It needs the
libraries that its own requirements name (gguf, sentencepiece).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from lcprune.errors import InputError, RunError
from lcprune.files import check_file

SCRIPT = "convert_hf_to_gguf.py"
PLACE = "LLAMA_CPP"
"""Environment variable with a checkout of llama.cpp, or with the script itself."""
TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
"""What the converter can store weights in; auto = 16 bit. Smaller ones are made of these by llama-quantize."""
MAGIC = b"GGUF"


@dataclass(frozen=True)
class Fixed:
    """What llama.cpp knows of a family's layers by their number alone; no GGUF file can tell it otherwise."""

    field: str
    """The config's list with the kinds of the layers."""
    kinds: tuple[object, ...]
    """Of the first layers, and of those behind them over and over."""
    wide: int | None = None
    """The number of layers by which llama.cpp takes queries to be scaled by the width of a head in the stream, and not
    by its own; None = it never does."""


_SLIDING, _FULL = "sliding_attention", "full_attention"
FIXED = {
    "gemma2": Fixed("layer_types", (_SLIDING, _FULL), wide=46),
    "gemma3_text": Fixed("layer_types", (*[_SLIDING] * 5, _FULL), wide=62),
    "smollm3": Fixed("no_rope_layers", (1, 1, 1, 0)),
}
"""By model_type (llama.cpp, src/llama-model.cpp: set_swa_pattern, n_no_rope_layer_step, f_attention_scale)."""


def converter() -> Path:
    """llama.cpp's converter.

    Raises:
        InputError: It is nowhere to be found.
    """
    named = os.environ.get(PLACE)
    if named is not None:
        place = Path(named).expanduser()
        script = place if place.is_file() else place / SCRIPT
        if not script.is_file():
            raise InputError(f"{PLACE}={named} holds no {SCRIPT}: name a checkout of llama.cpp.")
        return script
    found = shutil.which(SCRIPT)
    if found is None:
        raise InputError(
            f"--gguf needs llama.cpp's {SCRIPT}, which is not on PATH: `git clone "
            f"https://github.com/ggml-org/llama.cpp`, `pip install gguf sentencepiece`, and set {PLACE} to that folder."
        )
    return Path(found)


def check(out: Path, kind: str) -> None:
    """Raises InputError unless `convert` can begin; to be called before any work.

    Args:
        out: The file to make.
        kind: Of `TYPES`.
    """
    if kind not in TYPES:
        raise InputError(f"--gguf-type {kind} must be one of {', '.join(TYPES)}.")
    if out.suffix != ".gguf":
        raise InputError(f"--gguf {out} must be a file that ends in .gguf.")
    check_file("--gguf", out)
    converter()


def convert(folder: Path, out: Path, kind: str = "auto") -> None:
    """Writes `out`, whole or not at all.

    Args:
        folder: An export.
        out: The file to make; an earlier one is replaced.
        kind: What the weights are stored in, of `TYPES`.

    Raises:
        InputError: llama.cpp would take its layers for others.
        RunError: The converter failed; nothing was left behind.
    """
    check_layers(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.stem}.tmp-{os.getpid()}.gguf")
    command = [sys.executable, str(converter()), str(folder), "--outfile", str(partial), "--outtype", kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not _is_gguf(partial):
            raise RunError(
                f"llama.cpp's converter made no {out} of {folder} ({_last_line(done)}): see to "
                f"what it asks for, or try another version of {command[1]}."
            )
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def check_layers(folder: Path) -> None:
    """Refuses a model whose merges have moved layers to where llama.cpp expects others; the converter would not notice.

    Raises:
        InputError: A layer's kind is not the one that llama.cpp gives its number, or queries are scaled otherwise.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if (fixed := FIXED.get(kind)) is None:
        return
    kinds = zip(config.get(fixed.field) or [], cycle(fixed.kinds), strict=False)
    differing = next(((layer, *pair) for layer, pair in enumerate(kinds) if pair[0] != pair[1]), None)
    if differing is not None:
        layer, found, expected = differing
        raise InputError(
            f"{folder} makes no GGUF file: its {fixed.field} says {found} of layer {layer}, and llama.cpp, which goes "
            f"by the layer's number, takes every {kind} to have {expected} there: merge so that layers go by whole "
            f"multiples of {len(fixed.kinds)} at once, or run the folder with transformers or vLLM."
        )
    if (scale := _scale(config, fixed)) is not None and scale != config["query_pre_attn_scalar"]:
        raise InputError(
            f"{folder} makes no GGUF file: its query_pre_attn_scalar is {config['query_pre_attn_scalar']}, and "
            f"llama.cpp, which goes by the number of layers, takes a {kind} of {config['num_hidden_layers']} layers to "
            f"have {scale}: keep its depth, or run the folder with transformers or vLLM."
        )


def _scale(config: Mapping[str, Any], fixed: Fixed) -> int | None:
    """By the root of what llama.cpp divides queries; None = by what every reader does."""
    if fixed.wide is None:
        return None
    if config["num_hidden_layers"] == fixed.wide:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _is_gguf(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as content:
        return content.read(len(MAGIC)) == MAGIC


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a program said last: of a Python script the exception."""
    lines = f"{done.stdout}\n{done.stderr}".strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else f"exit status {done.returncode}"
