"""What a type checker sees of lcprune in a user's own file."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lcprune

ROOT = Path(__file__).resolve().parents[1]
USER = """\
from dataclasses import dataclass

import lcprune


@dataclass(frozen=True)
class Last(lcprune.Criterion):
    def score(self, calibration: lcprune.Calibration) -> tuple[float, ...]:
        return (1.0, 0.0)


def schedule(depth: int) -> lcprune.Schedule:
    try:
        return lcprune.Evenly(depth, merges=3)
    except lcprune.InputError as error:
        print(error)
        return lcprune.Evenly(depth)


callback = lcprune.ProgressiveCollapse(
    schedule(20), planner=lcprune.OneShotRanking(Last()), operator=lcprune.Concat(), refit=lcprune.RidgeRefit()
)
levels: list[lcprune.Level] = [lcprune.Logits(), lcprune.Boundary()]
module = lcprune.DistillationModule(teacher="demo:smollm2", objective=levels)
history: lcprune.MergeHistory = lcprune.load_history("short")
depth: int = history.depth
"""


def checked(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "mine.py"
    file.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", str(file)]
    return subprocess.run(
        [*command, f"--cache-dir={folder / 'cache'}"],
        cwd=folder,
        env={**os.environ, "MYPYPATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_type_checkers_see_every_public_name():
    tree = ast.parse((ROOT / "lcprune" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {alias.asname: node.module for alias in node.names if alias.asname == alias.name}
    assert seen == {name: module for module, names in lcprune._HOMES.items() for name in names}


@pytest.mark.slow
def test_user_s_file_is_checked_strictly_and_a_misspelt_name_is_an_error(tmp_path: Path):
    pytest.importorskip("mypy")
    wrong = 'lcprune.Evently(20)\nlcprune.Evenly(20, merges="3")\n'
    found = checked(USER + wrong, tmp_path)
    first = USER.count("\n") + 1
    errors = [line for line in found.stdout.splitlines() if " error: " in line]
    assert [line.split(":")[1] for line in errors] == [str(first), str(first + 1)], found.stdout
    assert 'no attribute "Evently"' in errors[0]
    assert '"merges" to "Evenly" has incompatible type "str"; expected "int"' in errors[1]
