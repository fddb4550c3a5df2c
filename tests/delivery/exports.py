"""What the tests of exports have in common: a history, and what lies in a folder."""

from pathlib import Path

from lcprune.merging.lineage import MergeHistory, MergeStep

HISTORY = MergeHistory(
    teacher_depth=6,
    steps=(
        MergeStep((3, 4), {"class_path": "lcprune.merging.operators.Drop"}, (1.0, 0.0), global_step=40),
        MergeStep((1, 2), {"class_path": "WeightedAverage"}, (0.25, 0.75), scores={"bi": 0.5}, global_step=80),
    ),
    teacher="example/tiny",
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
