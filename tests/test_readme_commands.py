"""Every command of the README, typed as it stands there, by someone whose model is tiny.

The recipes are those of the repository with a teacher of 30 layers of width 32, two optimizer steps, one merge at the
start and a page of text; names of models that are not at hand and amounts that do not fit a tiny one are replaced.
"""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from lcprune.cli import main
from lcprune.delivery import gguf, hub
from tests import builders
from tests.cli.recipe import text_file
from tests.processes import ROOT, python

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # libraries warn of what is tiny

SHELL = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = sorted(set(re.findall(r"^(lcprune [^#\n]*?) *(?:#.*)?$", "".join(SHELL), re.MULTILINE)))
SMALLER = {
    "Qwen/Qwen3-0.6B": "my-model",
    "400MB": "900KB",
    "documents 256": "documents 8 --data.generate.tokens 64 --data.path null",
}
BY_LM_EVAL = "lcprune evaluate short --tasks piqa,arc_easy"


def shrunk(content: dict) -> dict:
    """A recipe for the tiny model."""
    trainer, collapse, data = (content.setdefault(name, {}) for name in ("trainer", "collapse", "data"))
    trainer |= {"max_steps": 2, "max_epochs": -1, "accelerator": "cpu", "enable_progress_bar": False}
    trainer |= {"val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    for callback in trainer.get("callbacks", ()):
        if callback["class_path"].endswith("ModelCheckpoint"):
            callback["init_args"]["every_n_train_steps"] = 1
    schedule = collapse.get("schedule")
    if schedule is not None and schedule["class_path"] == "Evenly":
        schedule["init_args"] = {"target_depth": schedule["init_args"]["target_depth"]}
    data |= {"path": "my.jsonl", "block_size": 96, "batch_size": 2, "calibration_blocks": 4, "validation_blocks": 2}
    content.setdefault("model", {})["teacher"] = "my-model"
    return content


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all that the README speaks of is there."""
    folder = tmp_path_factory.mktemp("readme")
    builders.save_tiny(folder / "my-model", builders.tiny_llama(30))
    words = text_file(folder, 2400).rename(folder / "my.txt").read_text().split()
    texts = [" ".join(words[first : first + 40]) for first in range(0, len(words), 40)]
    for name in ("my", "mix", "calibration"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pairs = [{"prompt": text[:40], "response": text[40:90]} for text in texts]
    (folder / "chat.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "tasks").mkdir()
    row = {"context": "a layer", "choices": ["merges", "does not"], "label": 0}
    (folder / "tasks" / "merging.jsonl").write_text((json.dumps(row) + "\n") * 4)
    for source in (ROOT / "recipes").rglob("*.yaml"):
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(yaml.safe_dump(shrunk(yaml.safe_load(source.read_text(encoding="utf-8")))))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("quickstart", "progressive", "shortgpt"):
            assert main(["fit", "--config", f"recipes/{name}.yaml"]) == 0
        for name in ("a", "b"):
            shutil.copytree("runs/quickstart", f"runs/{name}")
        # A run that does not merge itself, stopped.
        unmerged = ["--collapse.schedule", "null", "--trainer.default_root_dir", "runs/unmerged"]
        logged = ["--trainer.logger.init_args.save_dir", "runs/unmerged"]
        assert main(["fit", "--config", "recipes/progressive.yaml", *unmerged, *logged]) == 0
        shutil.copy("runs/unmerged/checkpoints/last.ckpt", "last.ckpt")
        shutil.copy("runs/unmerged/recipe.yaml", "recipe.yaml")
        assert main(["collapse", "--config", "recipes/shortgpt.yaml", "--out", "short"]) == 0
        assert main(["collapse", "--config", "recipes/shortgpt.yaml", "--plan-only"]) == 0
        assert main(["cache", "--config", "recipes/shortgpt.yaml", "--out", "cache"]) == 0
    return folder


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where the commands are typed; the hub and llama.cpp are played."""
    folder = shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(folder)
    converter = tmp_path / gguf.SCRIPT
    converter.write_text("import pathlib, sys\npathlib.Path(sys.argv[3]).write_bytes(b'GGUF')\n")
    monkeypatch.setenv(gguf.PLACE, str(tmp_path))
    monkeypatch.setattr(hub, "check", lambda name: None)
    monkeypatch.setattr(hub, "push", lambda folder, name: f"https://example.org/{name}")
    return folder


def typed(command: str) -> list[str]:
    """The arguments, for the tiny model."""
    for large, small in SMALLER.items():
        command = command.replace(large, small)
    if "recipes/chat.yaml" in command:
        command = command.replace("my.jsonl", "chat.jsonl")
    return shlex.split(command)[1:]


@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if "--trainer.devices" not in each and each != BY_LM_EVAL]
)
def test_command_of_the_readme_runs(command: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(typed(command)) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", [each for each in COMMANDS if "--trainer.devices" in each])
def test_command_of_the_readme_for_several_devices_runs(command: str, here: Path):
    # Lightning starts the second process by the first one's command line.
    python("-m", "lcprune", *typed(command), cwd=here, timeout=300)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="would fetch tasks from the hub")
def test_command_of_the_readme_that_needs_an_extra_names_it(here: Path, capsys: pytest.CaptureFixture[str]):
    assert BY_LM_EVAL in COMMANDS
    assert main(typed(BY_LM_EVAL)) == 2
    assert "pip install 'lcprune[eval]'" in capsys.readouterr().err
