"""Teachers for benchmarks: random models of real shapes, and the merges that all of them are given.

Speed and memory depend on shapes and types, not on what the weights say: a random model in a temporary folder stands
for one that cannot be fetched. Only torch and transformers are needed here.
"""

import argparse
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which teacher, how it is merged, and where and in what both are run."""
    parser.add_argument("--model", default="demo:smollm2", help="teacher: hub name, folder or demo:smollm2")
    parser.add_argument("--random", choices=list(SHAPES), help="a random model of this shape instead")
    parser.add_argument("--layers", type=int, help="of --random, instead of the shape's own")
    parser.add_argument("--hidden", type=int, help="of --random")
    parser.add_argument("--vocabulary", type=int, help="of --random")
    parser.add_argument("--block-size", type=int, default=256, help="tokens in a block")
    parser.add_argument("--depth", type=int, help="layers of the student; default: 24 of 30")
    parser.add_argument("--first", type=int, help="first merged layer; default: 12 of 30")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="bfloat16: as bf16-mixed")


def parsed(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The command line; sizes without a shape are refused."""
    given = parser.parse_args(arguments)
    if given.random is None and any(value is not None for value in (given.layers, given.hidden, given.vocabulary)):
        parser.error("--layers, --hidden and --vocabulary are sizes of --random: name its shape.")
    return given


def teacher_of(given: argparse.Namespace, folder: Path) -> str:
    """The model that was named, or a random one written to a folder."""
    if given.random is None:
        return str(given.model)
    config = config_of(given.random, layers=given.layers, hidden=given.hidden, vocabulary=given.vocabulary)
    # Weights are stored as they are run; float32 would take more than twice as long to read.
    return str(save_random(folder, config, getattr(torch, given.dtype), given.device))


def save_random(folder: Path, config: LlamaConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Path:
    """Writes a random model of a config, always the same on a kind of device."""
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def pairs(depth: int, target: int, first: int) -> list[list[int]]:
    """Neighbours that merge, one pair behind the other from layer `first` on, until `target` layers are left."""
    groups = [[start, start + 1] for start in range(first, first + 2 * (depth - target), 2)]
    if not groups or groups[-1][-1] >= depth:
        raise SystemExit(f"--depth {target}: from layer {first} on, {depth} layers hold no {depth - target} pairs.")
    return groups
