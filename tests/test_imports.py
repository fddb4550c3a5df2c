"""The import rule of the house, read from the sources: rooms one way, files downward, heavy libraries in one place.

    cli -> delivery, distillation -> merging        data beside them: only cli knows it

A file that is not in the tables below fails the test: give it its place first.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS = {
    # A file may import the files before it in its own room. The planners' searches need surgery.trial.
    "merging": "checks depths progress double lineage specs families architectures activity packed storages "
    "calibration streams remeasure regression observation projection prefix operators concat surgery criteria "
    "gradients planners progressive greedy refit search budget within collapse shards streaming rounding heatmaps",
    "distillation": "schedules triggers standing stages accumulation strategies randomness storing boundary faults "
    "signals stepping divergences buckets head rows fused losses metrics levels kernels trained passes "
    "quantized adapters teacher fingerprint beginning tracing pair footprint phases beforehand objectives evaluated "
    "averaging cache fill recall sharded optim checkpoint resumable module given throughput companions guests undo "
    "merges callbacks offline forecast comparison",
    "data": "preprocess columns paths sources chat tokens packing loader mixture streaming store corpus author "
    "generate origin module",
    "delivery": "pictures card spellings inherited export decoding choices speed figures evaluate harness hub gguf "
    "training_log tree plots runs provenance likeness samples page wording sections report",
}
ROOMS_BELOW = {"merging": (), "data": (), "distillation": ("merging",), "delivery": ("merging",)}
LEAVES = (
    "errors",
    "amounts",
    "files",
    "demo",
    "models",
    "weights",
    "identity",
)  # importable by all, importing one another at most
ENTRIES = ("", "api", "cli", "__main__")  # with all files below them: importable by no room, importing what they like

# Third-party libraries a place may import, the most exact name counting; a place without a line may import any.
LIBRARIES = {
    "errors": (),
    "merging": ("torch", "transformers"),
    "merging.lineage": (),
    "merging.specs": (),
    "merging.progress": (),
    "merging.depths": (),
    "distillation.schedules": (),
    "distillation.triggers": (),
    "distillation.divergences": ("torch",),
    "distillation.buckets": ("torch",),
    "distillation.head": ("torch",),
    "distillation.rows": ("torch", "triton"),
    "distillation.fused": ("torch",),
    "distillation.losses": ("torch",),
}
IN_ONE_MODULE = ("datasets", "lm_eval", "matplotlib", "peft", "bitsandbytes")
HEAVY = {"torch", "transformers", "lightning", "datasets", "numpy"}
LIGHT = ("", "cli", "errors", "merging.lineage", "distillation.schedules", "distillation.triggers")


def _place(path: Path) -> str:
    """The dotted name below lcprune: "" for the package, "merging" for a room's __init__, "merging.lineage"."""
    parts = path.relative_to(ROOT / "lcprune").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {_place(path): path for path in sorted((ROOT / "lcprune").rglob("*.py"))}
OUTSIDE_CLI = {place for place in SOURCES if place.split(".")[0] not in ENTRIES}
FILES = {f"{room}.{name}": index for room, names in ROOMS.items() for index, name in enumerate(names.split())}


def _imports(place: str) -> set[str]:
    """Every module imported anywhere in the file, functions and TYPE_CHECKING included, as absolute dotted names."""
    path = SOURCES[place]
    package = ["lcprune", *path.relative_to(ROOT / "lcprune").parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from lcprune.merging import lineage` names a file, `from lcprune.errors import InputError` a value.
            inside = {f"{module}.{alias.name}" for alias in node.names}
            files = {name for name in inside if name.removeprefix("lcprune.") in {*FILES, *ROOMS, *LEAVES, *SOURCES}}
            found |= files | ({module} if files != inside else set())
    return found


def _ours(place: str) -> set[str]:
    names = {name for name in _imports(place) if name.split(".")[0] == "lcprune"}
    return {name.removeprefix("lcprune").removeprefix(".") for name in names}


def _foreign(place: str) -> set[str]:
    return {name.split(".")[0] for name in _imports(place)} - {"lcprune"} - sys.stdlib_module_names


def _may_import(place: str, other: str) -> bool:
    room, other_room = place.split(".")[0], other.split(".")[0]
    if room in ENTRIES or other in LEAVES:
        return place != "errors"
    if room != other_room:
        return other_room in ROOMS_BELOW.get(room, ())
    return place == room or FILES.get(other, len(FILES)) < FILES.get(place, 0)


@pytest.mark.parametrize(
    ("place", "other", "allowed"),
    [
        ("cli.training", "delivery.export", True),
        ("distillation.module", "merging.surgery", True),
        ("distillation.module", "distillation.losses", True),
        ("merging", "merging.refit", True),
        ("merging.lineage", "errors", True),
        ("merging.surgery", "merging.planners", False),
        ("merging.surgery", "merging", False),
        ("merging.surgery", "distillation.losses", False),
        ("distillation.losses", "distillation.module", False),
        ("distillation.module", "data.module", False),
        ("data.module", "merging.lineage", False),
        ("delivery.export", "cli.tables", False),
        ("errors", "demo", False),
    ],
)
def test_imports_rule_says_what_the_house_plan_says(place: str, other: str, allowed: bool):
    assert _may_import(place, other) == allowed


def test_imports_every_source_has_a_place_in_the_tables():
    assert not OUTSIDE_CLI - {*FILES, *ROOMS, *LEAVES}


@pytest.mark.parametrize("place", SOURCES)
def test_imports_run_one_way(place: str):
    assert not {other for other in _ours(place) if not _may_import(place, other)}


@pytest.mark.parametrize("place", SOURCES)
def test_imports_third_party_libraries_stay_in_their_places(place: str):
    allowed = next((LIBRARIES[name] for name in (place, place.split(".")[0]) if name in LIBRARIES), None)
    assert allowed is None or _foreign(place) <= set(allowed)


@pytest.mark.parametrize("library", IN_ONE_MODULE)
def test_imports_heavy_library_is_known_to_one_module_of_the_rooms_at_most(library: str):
    assert sum(library in _foreign(place) for place in OUTSIDE_CLI) <= 1


@pytest.mark.parametrize("place", [place for place in LIGHT if place in SOURCES])
def test_imports_plain_data_needs_no_heavy_library(place: str):
    name = f"lcprune.{place}".rstrip(".")
    code = f"import sys, {name}; sys.exit(' '.join({HEAVY} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stderr.strip() == ""
