"""What `collapse --stream` needs: `python tests/benchmarks/stream.py [--hidden 1536 --channels 4096 --layers 18]`.

A random Llama is written to a temporary folder layer by layer, then `lcprune collapse --stream` shortens it by
BlockInfluence and Drop in a process whose address space is limited (RLIMIT_AS: whatever is mapped counts, files and
0.8 GB of libraries included, so that no trick with memory maps passes). The ordinary command is run under the same
limit for comparison. The last line is one JSON object; `peak_rss_bytes` is the largest resident memory of the
streaming process, `idle_rss_bytes` that of a process that has only imported the command.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune.merging.shards import ShardWriter
from lcprune.merging.streaming import stored_tensors, without_weights
from tests.builders import EOS, VOCABULARY, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Size:
    """Of a random Llama in float32."""

    hidden: int
    channels: int
    layers: int


def save_large(folder: Path, size: Size) -> Path:
    """Writes a random Llama, one tensor in memory at a time, and a character tokenizer."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.channels,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 128,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        dtype="float32",
    )
    model = without_weights(config, torch.float32)
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    expected = stored_tensors(model)
    writer = ShardWriter(folder, expected, 10**9)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in expected.items():
        norm = tensor.dim() == 1
        values = torch.ones(tensor.shape) if norm else torch.randn(tensor.shape, generator=generator) * 0.02
        writer.write(name, [values])
    return folder


def collapse(model: Path, out: Path, given: argparse.Namespace, *flags: str) -> dict[str, float]:
    """One run of the command under the limit: exit status, seconds, peak resident memory."""
    recipe = {
        "trainer": {"accelerator": "cpu", "logger": False},
        "collapse": {"planner": "OneShotRanking", "operator": "Drop"},
        "model": {"teacher": str(model)},
        "data": {"block_size": given.block_size, "batch_size": 1, "calibration_blocks": given.blocks},
    }
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    arguments = ["collapse", "--config", str(config), "--target-depth", str(given.target), "--out", str(out), *flags]
    return limited(f"import sys; from lcprune.cli import main; sys.exit(main({arguments!r}))", given)


def limited(code: str, given: argparse.Namespace) -> dict[str, float]:
    """Runs Python code in a process of its own, and asks that process what it needed."""
    told = "import atexit, resource; atexit.register(lambda: print('peak', resource.getrusage(0).ru_maxrss))"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", f"{told}\n{code}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(given.threads), "MALLOC_ARENA_MAX": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (given.limit, given.limit)),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1:], file=sys.stderr)
    peak = [int(line.split()[1]) * 1024 for line in done.stdout.splitlines() if line.startswith("peak ")]
    return {"status": done.returncode, "seconds": time.perf_counter() - began, "peak": peak[-1] if peak else 0}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--target", type=int, default=14, help="layers of the student")
    parser.add_argument("--limit", type=int, default=1_600_000_000, help="bytes of address space")
    parser.add_argument("--blocks", type=int, default=16, help="calibration blocks")
    parser.add_argument("--block-size", type=int, default=512, help="tokens in a block")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write the models; default: the temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        model = save_large(Path(folder) / "model", Size(given.hidden, given.channels, given.layers))
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        ordinary = collapse(model, Path(folder) / "ordinary", given)
        idle = limited("import lcprune.cli.merging", given)
        streamed = collapse(model, Path(folder) / "short", given, "--stream")
        written = sum(file.stat().st_size for file in (Path(folder) / "short").glob("*.safetensors"))
        shutil.rmtree(model)
    result = {
        "weights_bytes": size,
        "written_bytes": written,
        "limit_bytes": given.limit,
        "layer_bytes": size // given.layers,
        "tokens": given.blocks * given.block_size,
        "stream_status": streamed["status"],
        "peak_rss_bytes": streamed["peak"],
        "idle_rss_bytes": idle["peak"],
        "seconds": round(streamed["seconds"], 1),
        "ordinary_status": ordinary["status"],
        "device": f"cpu, {given.threads} threads",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
