"""How long the head loss takes on a GPU: `python tests/benchmarks/loss_speed.py --tokens 8192 [--only rows liger]`.

    rows         head_loss as it is: one kernel per token makes divergence and gradient of the logits
    operations   head_loss without that kernel, as on CPUs: the same from torch's operations on whole chunks
    liger        liger-kernel's fused linear KL, chunk by chunk, from the teacher's probabilities

All from last states and heads (bfloat16 products, float32 student head, as in bf16-mixed) to the gradients of states
and student head, by forward KL, at Llama-3.2-1B's shape. `ms` is the least of the repeats, `mb` the allocator's peak
beyond what is given. The last line is one JSON object: form -> chunk -> figures. On CPUs only `operations` runs.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcprune.distillation import fused
from lcprune.distillation.head import Head
from lcprune.distillation.losses import head_loss
from tests.benchmarks.memory import resident

MB = 2**20


@dataclass(frozen=True, eq=False)
class Given:
    """States and heads of both."""

    student_ND: Tensor
    student_VD: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    targets_N: Tensor

    @classmethod
    def drawn(cls, tokens: int, hidden: int, vocabulary: int, device: str) -> "Given":
        """Random ones, the same every time."""
        torch.manual_seed(0)
        low = {"device": device, "dtype": torch.bfloat16}
        return cls(
            torch.randn(tokens, hidden, **low).requires_grad_(),
            torch.randn(vocabulary, hidden, device=device).mul_(0.02).requires_grad_(),
            torch.randn(tokens, hidden, **low),
            torch.randn(vocabulary, hidden, **low).mul_(0.02),
            torch.randint(vocabulary, (tokens,), device=device),
        )


def ours(given: Given, chunk: int) -> None:
    """`head_loss` and its way back."""
    with torch.autocast(given.student_ND.device.type, torch.bfloat16):
        loss = head_loss(
            given.student_ND,
            Head(given.student_VD),
            given.teacher_ND,
            Head(given.teacher_VD),
            targets_N=given.targets_N,
            chunk=chunk,
        )
    loss.total.backward()


def operations(given: Given, chunk: int) -> None:
    """The same without the kernel."""
    with patch.object(fused, "computes_by_rows", lambda *_: False):
        ours(given, chunk)


def liger(given: Given, chunk: int) -> None:
    """Liger's, each chunk's gradients added up before the next one, as ours are."""
    from liger_kernel.transformers.functional import liger_fused_linear_kl_div

    low_VD = given.student_VD.detach().to(torch.bfloat16).requires_grad_()
    total_VD = torch.zeros_like(given.student_VD)
    gradient_ND = torch.empty_like(given.student_ND)
    for begin in range(0, len(given.targets_N), chunk):
        part = slice(begin, begin + chunk)
        states_CD = given.student_ND[part].detach().requires_grad_()
        p_CV = torch.softmax(given.teacher_ND[part] @ given.teacher_VD.t(), -1, dtype=torch.float32)
        loss = liger_fused_linear_kl_div(states_CD, low_VD, p_CV, reduction="sum", accum_dtype=torch.float32)
        found_CD, found_VD = torch.autograd.grad(loss, [states_CD, low_VD])
        gradient_ND[part] = found_CD
        total_VD += found_VD
    given.student_ND.grad, given.student_VD.grad = gradient_ND, total_VD


FORMS: dict[str, tuple[Callable[[Given, int], None], list[int]]] = {
    "rows": (ours, [512, 1024, 2048]),
    "operations": (operations, [256, 1024]),
    "liger": (liger, [2048, 4096]),
}
"""What runs, and the chunks that it is given."""


def measured(form: Callable[[Given, int], None], given: Given, chunk: int, repeats: int) -> dict[str, float]:
    """Milliseconds and MB, after one call that warms up."""
    cuda = given.student_ND.is_cuda
    seconds, most = [], 0
    for _ in range(repeats + 1):
        given.student_ND.grad = given.student_VD.grad = None
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
        began = time.perf_counter()
        form(given, chunk)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        most = (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before
    return {"ms": round(1e3 * min(seconds[1:]), 2), "mb": round(most / MB)}


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=list(FORMS), default=list(FORMS))
    given = parser.parse_args(arguments)
    drawn = Given.drawn(given.tokens, given.hidden, given.vocabulary, given.device)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name in given.only if given.device == "cuda" else ["operations"]:
        form, chunks = FORMS[name]
        for chunk in chunks:
            found.setdefault(name, {})[chunk] = measured(form, drawn, chunk, given.repeats)
            print(f"{name:10s} chunk {chunk:5d} {found[name][chunk]}", flush=True)
    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    print(json.dumps({**found, "tokens": given.tokens, "vocabulary": given.vocabulary, "device": device}))


if __name__ == "__main__":
    main()
