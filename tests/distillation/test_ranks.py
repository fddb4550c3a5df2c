"""Two processes do what one does with the same global batch: curves, refits, phases, adapters, resuming, memory."""

import json
from pathlib import Path

import pytest

from tests.processes import python

LAYER = 9280
"""Parameters of a decoder layer of the tiny Llama."""

Rank = dict[str, dict[str, float]]


def ranks(folder: Path, teacher: Path, text: Path, scenario: str, strategy: str) -> list[Rank]:
    """What every process of a run says."""
    folder.mkdir()
    python("-m", "tests.distillation.ranks_run", folder, teacher, text, scenario, strategy)
    files = sorted(folder.glob("rank*.json"))
    assert len(files) == (1 if "one" in strategy else 2)
    return [json.loads(file.read_text()) for file in files]


def check_alike(alone: Rank, both: list[Rank], within: float = 1e-4) -> None:
    """One student on both ranks, and it learns as the one of a single process does."""
    first, second = both
    for same in ("exact", "digest", "lineage", "held", "trained"):
        assert first[same] == second[same], same
    for same in ("lineage", "held", "states", "trained"):
        assert first[same] == alone[same], same
    assert first["losses"].keys() == alone["losses"].keys() == {str(step) for step in range(1, 11)}
    for step, loss in alone["losses"].items():
        assert (first["losses"][step] + second["losses"][step]) / 2 == pytest.approx(loss, abs=within), step
    assert [rank["dead"] for rank in (alone, *both)] == [0, 0, 0]
    assert [rank["seen_layers"] for rank in both] == [alone["seen_layers"]] * 2


DDP = ["curve", "refit", "phases", "local", "adapters"]
FSDP = ["curve", "refit", "phases", "mixed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "strategy"), [*((each, "ddp") for each in DDP), *((each, "fsdp") for each in FSDP)]
)
def test_two_processes_train_and_merge_like_one_with_the_same_global_batch(
    tiny_folder: Path, text: Path, tmp_path: Path, scenario: str, strategy: str
):
    (alone,) = ranks(tmp_path / "one", tiny_folder, text, scenario, "one")
    both = ranks(tmp_path / strategy, tiny_folder, text, scenario, strategy)
    check_alike(alone, both, 3e-2 if scenario == "mixed" else 1e-4)  # halves of a batch round otherwise in bfloat16
    if scenario == "curve":
        held = LAYER if strategy == "ddp" else LAYER // 2
        for rank in both:
            # Of one layer three float32 numbers per parameter have gone; there are no gradients before a step.
            before, then, now = (rank["bytes"][step] for step in ("1", "4", "7"))
            assert before - then == pytest.approx(3 * 4 * held, abs=256)  # but for counters of steps
            assert then - now == pytest.approx(3 * 4 * held, abs=256)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp-distributed"])
def test_two_processes_that_were_interrupted_end_like_those_that_were_not(
    tiny_folder: Path, text: Path, tmp_path: Path, strategy: str
):
    whole = ranks(tmp_path / "whole", tiny_folder, text, "whole", strategy)
    for scenario in ("resume", "resume at"):
        resumed = ranks(tmp_path / scenario, tiny_folder, text, scenario, strategy)
        for before, after in zip(whole, resumed, strict=True):
            assert (before["exact"], before["losses"]) == (after["exact"], after["losses"])
            assert before["digest"] == after["digest"]


def test_shards_of_one_process_merge_and_resume_and_let_go_of_layers(tiny_folder: Path, text: Path, tmp_path: Path):
    (rank,) = ranks(tmp_path / "fsdp", tiny_folder, text, "resume", "fsdp-one")
    assert rank["lineage"] == [[0], [1, 2], [3, 4], [5]]
    assert sorted(map(int, rank["losses"])) == list(range(1, 11))
    assert len(rank["held"]) == rank["states"] == 4 * 9 + 2
    assert None not in rank["held"]
    assert rank["dead"] == 0
