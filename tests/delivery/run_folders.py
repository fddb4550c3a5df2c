"""Run folders as `lcprune fit` leaves them, written by hand: no model, no training."""

import json
from pathlib import Path

from lcprune.merging.lineage import MergeHistory, MergeStep

DROP = {"class_path": "lcprune.merging.operators.Drop", "init_args": {"keep": "first"}}
AVERAGE = {"class_path": "lcprune.merging.operators.WeightedAverage"}

METRICS = """\
depth,epoch,step,train/loss,train/logits,val/perplexity,val/perplexity_after_merge,val/teacher_perplexity
5.0,,0,,,,30.0,20.0
5.0,0,0,0.9,0.6,,,
5.0,0,1,0.8,0.5,,,
,0,1,,,25.0,,20.0
3.0,,2,,,,40.0,20.0
3.0,0,2,1.2,0.9,,,
3.0,0,3,1.0,0.7,,,
"""
RECIPE = """\
# lcprune==0.1.0
# lightning==2.6.6
trainer: {accelerator: cpu, devices: auto, num_nodes: 1, accumulate_grad_batches: 2}
model: {teacher: somebody/six-layers, student: null}
data: {block_size: 32, batch_size: 4}
"""


def step(*group: int, at: int | None = None, operator: dict[str, object] = AVERAGE, **more: object) -> MergeStep:
    return MergeStep(group, operator, (1 / len(group),) * len(group), global_step=at, **more)  # type: ignore[arg-type]


def six_to_three() -> MergeHistory:
    """Layers 3 and 4 at step 0; then 2 and what these became, and 0 and 1, at step 2."""
    steps = (step(3, 4, at=0), step(2, 3, at=2), step(0, 1, at=2, measured={"val/perplexity": 40.0}))
    return MergeHistory(6, steps, teacher="somebody/six-layers")


def figures(history: MergeHistory, perplexity: float = 22.0, parameters: int = 600_000) -> dict[str, object]:
    return {
        "teacher": {"layers": history.teacher_depth, "parameters": 1_000_000, "bytes": 4_000_000},
        "student": {"layers": history.depth, "parameters": parameters, "bytes": 4 * parameters},
        "speed": {"teacher": 1000.0, "student": 1500.0},
        "history": history.to_dict(),
        "final": {"val/perplexity": perplexity, "val/teacher_perplexity": 20.0, "val/agreement": 0.75},
    }


def write(folder: Path, history: MergeHistory | None = None, **changes: str | None) -> Path:
    """A finished run without weights.

    Args:
        folder: To be made.
        history: Of the run; default: `six_to_three`.
        changes: Content by file name with `__` for the dot, e.g. `recipe__yaml="..."`; None = no such file.
    """
    history = six_to_three() if history is None else history
    contents: dict[str, str | None] = {
        "recipe__yaml": RECIPE,
        "metrics__csv": METRICS,
        "figures__json": json.dumps(figures(history)),
        **changes,
    }
    folder.mkdir(parents=True)
    for name, content in contents.items():
        if content is not None:
            (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return folder
