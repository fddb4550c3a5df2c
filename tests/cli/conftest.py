"""A recipe and a finished run, for all tests of this room that need no other."""

from pathlib import Path

import pytest

from lcprune.cli import main
from tests.cli.recipe import recipe, text_file, write


@pytest.fixture(scope="session")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `lcprune fit` that has ended; read only."""
    folder = tmp_path_factory.mktemp("fit")
    assert main(["fit", "--config", str(write(folder, recipe(tiny_folder, text_file(folder), folder / "run")))]) == 0
    return folder


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> str:
    """The path of a recipe that merges a tiny model."""
    return str(write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run")))
