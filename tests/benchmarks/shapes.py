"""Teachers for benchmarks: random models of real shapes, and the merges that all of them are given.

Speed and memory depend on shapes and types, not on what the weights say: a random model in a temporary folder stands
for one that cannot be fetched. Only torch and transformers are needed here.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPES: dict[str, dict[str, object]] = {
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
}
"""Both tie their heads to their embeddings."""


def config_of(
    name: str, *, layers: int | None = None, hidden: int | None = None, vocabulary: int | None = None
) -> LlamaConfig:
    """A shape, perhaps with other sizes; the number of heads and the ratio of channels to hidden stay."""
    shape = dict(SHAPES[name])
    if hidden is not None:
        shape["intermediate_size"] = hidden * int(shape["intermediate_size"]) // int(shape["hidden_size"])  # type: ignore[call-overload]
        shape["hidden_size"] = hidden
    shape |= {"num_hidden_layers": layers} if layers is not None else {}
    shape |= {"vocab_size": vocabulary} if vocabulary is not None else {}
    heads = int(shape["num_attention_heads"])  # type: ignore[call-overload]
    width = int(shape["hidden_size"])  # type: ignore[call-overload]
    if width % (2 * heads):
        raise SystemExit(f"--hidden {width} must be a multiple of {2 * heads}, for the {heads} heads of {name}.")
    return LlamaConfig(
        **shape,
        head_dim=width // heads,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def save_random(folder: Path, config: LlamaConfig, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a random model of a config, always the same."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def pairs(depth: int, target: int, first: int) -> list[list[int]]:
    """Neighbours that merge, one pair behind the other from layer `first` on, until `target` layers are left."""
    groups = [[start, start + 1] for start in range(first, first + 2 * (depth - target), 2)]
    if not groups or groups[-1][-1] >= depth:
        raise SystemExit(f"--depth {target}: from layer {first} on, {depth} layers hold no {depth - target} pairs.")
    return groups
