"""An exported folder as one GGUF file, by llama.cpp's own converter, which is found and not carried along.

    LLAMA_CPP=~/llama.cpp        a checkout, or its convert_hf_to_gguf.py
    PATH                         convert_hf_to_gguf.py, as packages of llama.cpp install it

A shortened model is a plain one of its family, so that the converter needs to know nothing of lcprune. It needs the
libraries that its own requirements name (gguf, sentencepiece).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lcprune.errors import InputError, RunError
from lcprune.files import check_file

SCRIPT = "convert_hf_to_gguf.py"
PLACE = "LLAMA_CPP"
"""Environment variable with a checkout of llama.cpp, or with the script itself."""
TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
"""What the converter can store weights in; auto = 16 bit. Smaller ones are made of these by llama-quantize."""
MAGIC = b"GGUF"


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
        RunError: The converter failed; nothing was left behind.
    """
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


def _is_gguf(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as content:
        return content.read(len(MAGIC)) == MAGIC


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a program said last: of a Python script the exception."""
    lines = f"{done.stdout}\n{done.stderr}".strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else f"exit status {done.returncode}"
