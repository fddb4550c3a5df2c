"""A finished run, for all tests of this room that look at one or go on from it."""

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
