"""What a recipe's trainer gets beside its settings."""

from pathlib import Path

import pytest

from lcprune.cli import main
from tests.cli.recipe import recipe, text_file, write

NOT_BARE = ("logger", "callbacks", "enable_progress_bar", "log_every_n_steps", "num_sanity_val_steps")
"""What a bare trainer must not be told."""


@pytest.mark.filterwarnings("ignore:You are trying to .self.log")  # Lightning's, of a trainer that logs nothing
def test_bare_trainer_is_given_no_progress_bar(tiny_folder: Path, tmp_path: Path):
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run")
    trainer = content["trainer"]
    assert isinstance(trainer, dict)
    bare = {name: value for name, value in trainer.items() if name not in NOT_BARE}
    content["trainer"] = {**bare, "barebones": True, "devices": 1}
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 0
    assert (tmp_path / "run" / "student" / "config.json").is_file()
