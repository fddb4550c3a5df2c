"""Peak memory of the head loss against tokens: `python tests/benchmarks/loss_memory.py [--divergence jsd]`.

    ours     head_loss: logits of a chunk at a time, gradients taken on the way
    plain    logits of all tokens, the same divergence and cross-entropy on them, autograd

Both from last states and heads to the gradients of states and head, at SmolLM2's shape. What is given before (states,
heads) is not counted; the gradients are. Every figure comes from a process of its own: the allocator's peak on CUDA,
the process's peak beyond what it held before on CPUs. `growth` = ours at the most tokens over ours at the fewest, the
gradient of the states, which has to grow, taken off both. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune.distillation.divergences import KINDS, Divergence
from lcprune.distillation.fused import CHUNK, ROWS_CHUNK
from lcprune.distillation.head import Head
from lcprune.distillation.losses import head_loss
from tests.benchmarks.memory import resident

MB = 2**20


def plain(student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, kind: str) -> Tensor:
    """As one would write it; half of the labels' weight, as below."""
    log_q, log_p = student_NV.float().log_softmax(-1), teacher_NV.float().log_softmax(-1)
    labels = 0.5 * cross_entropy(student_NV.float(), targets_N)
    if kind == "forward_kl":
        return kl_div(log_q, log_p, log_target=True, reduction="batchmean") + labels
    if kind == "reverse_kl":
        return kl_div(log_p, log_q, log_target=True, reduction="batchmean") + labels
    share = 0.1 if kind == "skew_kl" else 0.5
    log_m = (share * log_p.exp() + (1 - share) * log_q.exp()).log()
    teacher = kl_div(log_m, log_p, log_target=True, reduction="batchmean")
    if kind == "skew_kl":
        return teacher + labels
    return (teacher + kl_div(log_m, log_q, log_target=True, reduction="batchmean")) / 2 + labels


def peak(device: str) -> int:
    """The most bytes that were in use so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def draw(*shape: int, like: argparse.Namespace) -> Tensor:
    """Small random numbers on the device."""
    return torch.randn(shape, device=like.device, dtype=getattr(torch, like.dtype)).mul_(0.3)


def step(given: argparse.Namespace, tokens: int, vocabulary: int) -> int:
    """Bytes beyond what was there before, of one forward and backward pass in this process."""
    student_VD, teacher_VD = (draw(vocabulary, given.hidden, like=given) for _ in range(2))
    student_ND, teacher_ND = (draw(tokens, given.hidden, like=given) for _ in range(2))
    student_VD.requires_grad_()
    student_ND.requires_grad_()
    targets_N = torch.randint(vocabulary, (tokens,), device=given.device)
    if given.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak(given.device)
    if given.form == "ours":
        divergence = Divergence(given.divergence, share=0.1 if given.divergence == "skew_kl" else 0.5)
        settings = {"targets_N": targets_N, "divergence": divergence, "labels_weight": 0.5, "chunk": given.chunk}
        head_loss(student_ND, Head(student_VD), teacher_ND, Head(teacher_VD), **settings).total.backward()
    else:
        with torch.no_grad():
            teacher_NV = teacher_ND @ teacher_VD.t()
        plain(student_ND @ student_VD.t(), teacher_NV, targets_N, given.divergence).backward()
    return peak(given.device) - before


def elsewhere(form: str, tokens: int) -> float | None:
    """MB of one form in a process of its own; None if it did not fit."""
    command = [sys.executable, __file__, *sys.argv[1:], "--form", form, "--tokens", str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        print(f"{form} at {tokens} tokens: {(result.stderr.strip().splitlines() or ['ended by the system'])[-1]}")
        return None
    return int(result.stdout.splitlines()[-1]) / MB


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument(
        "--chunk", type=int, help=f"tokens whose logits ours holds; default: {CHUNK}, on GPUs {ROWS_CHUNK}"
    )
    parser.add_argument("--divergence", choices=KINDS, default="forward_kl")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plain-up-to", type=int, default=8192, help="the plain form needs about 8 N V floats")
    parser.add_argument("--form", choices=["ours", "plain"], help="one figure in this process, in bytes")
    given = parser.parse_args()
    if given.form is not None:
        step(given, 8, 16)  # libraries load when they are first used
        print(step(given, given.tokens[0], given.vocabulary))
        return
    width = getattr(torch, given.dtype).itemsize
    gradient = {tokens: tokens * given.hidden * width / MB for tokens in given.tokens}
    ours, others = {}, {}
    print("tokens   ours MB   of it the states' gradient   plain MB")
    for tokens in given.tokens:
        ours[tokens] = elsewhere("ours", tokens)
        others[tokens] = elsewhere("plain", tokens) if tokens <= given.plain_up_to else None
        figures = ["-" if value is None else f"{value:.0f}" for value in (ours[tokens], others[tokens])]
        print(f"{tokens:6d}   {figures[0]:>7s}   {gradient[tokens]:26.1f}   {figures[1]:>8s}", flush=True)
    fewest, most = min(given.tokens), max(given.tokens)
    growth = None
    if ours[most] is not None and ours[fewest] is not None:
        growth = round((ours[most] - gradient[most]) / (ours[fewest] - gradient[fewest]), 4)
    result = {
        "growth": growth,
        "ours_mb": {tokens: value and round(value, 1) for tokens, value in ours.items()},
        "plain_mb": {tokens: value and round(value, 1) for tokens, value in others.items()},
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
