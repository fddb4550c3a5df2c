"""What a distillation step costs beside what it cannot do without: `python tests/benchmarks/step.py [--tokens 512]`.

    ours     DistillationModule's step: teacher, student, Logits + Boundary(merged), backward
    plain    transformers' own: teacher forward to logits, student forward with labels (cross-entropy), backward

Both on the same teacher and the same student (24 of SmolLM2's 30 layers), batch, dtypes and autocast, in alternation
in one process, so that whatever else the machine does meets both. The optimizer's step is in neither. The last line is
one JSON object; `overhead_ratio` = median over repeats of ours / plain.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from lcprune import Boundary, Calibration, DistillationModule, Drop, Logits, OneShotRanking
from lcprune.demo import DEMO
from lcprune.merging import surgery
from lcprune.merging.calibration import Batch


def shortened(module: DistillationModule, depth: int, batch: Batch) -> None:
    """Drops the layers of least block influence at once."""
    steps = OneShotRanking().plan(Calibration(module.student, [batch]), Drop(), depth)
    surgery.apply_all(module.student, steps)
    module.history = module.history.extend(steps)


def seconds(step: Callable[[], torch.Tensor], module: DistillationModule) -> float:
    """Time of one forward and backward pass, gradients dropped afterwards."""
    device = module.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = time.perf_counter() - begin
    module.zero_grad(set_to_none=True)
    return taken


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO, help="teacher: hub name, folder or demo:smollm2")
    parser.add_argument("--tokens", type=int, default=512, help="tokens in a batch, in blocks of 256")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of steps that are timed")
    parser.add_argument("--depth", type=int, default=24, help="layers of the student")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--float32", action="store_true", help="no autocast; default: bfloat16 as in bf16-mixed")
    given = parser.parse_args()

    torch.manual_seed(0)
    module = DistillationModule(
        teacher=given.model,
        objective=[Logits(), Boundary()],
        teacher_dtype="float32" if given.float32 else "bfloat16",
    )
    module.configure_model()
    assert module.teacher is not None
    teacher = module.teacher.model.to(given.device)
    module.to(given.device)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[assignment]  # there is no trainer
    length = min(256, given.tokens)
    shape = (given.tokens // length, length)
    input_ids = torch.randint(module.teacher_config.vocab_size, shape, device=given.device)
    batch = {"input_ids": input_ids, "labels": input_ids.clone()}
    shortened(module, given.depth, batch)

    def autocast() -> torch.autocast:
        return torch.autocast(given.device, dtype=torch.bfloat16, enabled=not given.float32)

    def ours() -> torch.Tensor:
        with autocast():
            return module.training_step(batch, 0)

    def plain() -> torch.Tensor:
        with torch.no_grad(), torch.autocast(given.device, enabled=False):
            _ = teacher(input_ids=input_ids, use_cache=False).logits
        with autocast():
            return module.student(**batch, use_cache=False).loss

    for step in (ours, plain):
        seconds(step, module)
    pairs = [(seconds(ours, module), seconds(plain, module)) for _ in range(given.repeats)]
    result = {
        "overhead_ratio": round(statistics.median(mine / theirs for mine, theirs in pairs), 4),
        "step_s": round(statistics.median(mine for mine, _ in pairs), 4),
        "plain_s": round(statistics.median(theirs for _, theirs in pairs), 4),
        "device": torch.cuda.get_device_name() if given.device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "tokens": int(input_ids.numel()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
