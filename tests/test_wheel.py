"""What is installed: every package of the source tree, and the recipes inside the package."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "models").glob("*.yaml")]


def test_packages_of_the_wheel_are_those_of_the_source_tree():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "lcprune").rglob("__init__.py")]
    found = {".".join(folder.parts) for folder in folders}
    assert set(settings["packages"]) == found | {"lcprune.recipes", "lcprune.recipes.models"}


def test_package_says_that_it_is_typed_and_the_wheel_takes_it_along():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert (ROOT / "lcprune" / "py.typed").read_bytes() == b""
    assert "py.typed" in settings["package-data"]["lcprune"]


@pytest.mark.slow
def test_recipes_of_an_installed_wheel_are_those_of_the_source_tree(tmp_path: Path):
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("lcprune", "recipes", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tree / name)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "."]
    subprocess.run([*build, "-w", str(tmp_path)], cwd=tree, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    names = {str(path.relative_to(tmp_path / "site" / "lcprune")) for path in (tmp_path / "site").rglob("*.yaml")}
    assert names == {str(path.relative_to(ROOT)) for path in RECIPES}
    assert (tmp_path / "site" / "lcprune" / "py.typed").is_file()
    code = "from lcprune.cli import main, recipes; print(recipes.__file__); main(['recipes', 'copy', 'qwen3-4b'])"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert str(tmp_path / "site") in shown.stdout
    assert (tmp_path / "qwen3-4b.yaml").read_bytes() == (ROOT / "recipes" / "models" / "qwen3-4b.yaml").read_bytes()
