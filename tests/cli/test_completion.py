"""`lcprune completion`: the script works in a real shell; every command's help has options and an example."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lcprune.cli import HELP, completion, main


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "lcprune.bash"
    path.write_text(completion.script("bash"))
    return path


def completed(script: Path, words: list[str], folder: Path) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    typed = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}"
    code = f"source '{script}'; {typed}; _lcprune; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    result = subprocess.run([bash, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert not result.stderr
    return result.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["lcprune", "col"], ["collapse", "collapse-checkpoint"]),
        (["lcprune", "fit", "--conf"], ["--config"]),
        (["lcprune", "fit", "--config", "my"], ["my recipe.yaml"]),
        (["lcprune", "fit", "--collapse.sch"], ["--collapse.schedule", "--collapse.schedule.help"]),
        (["lcprune", "collapse", "--target-d"], ["--target-depth"]),
        (["lcprune", "score", "--data.block"], ["--data.block_size"]),
        (["lcprune", "recipes", "copy", "qu"], ["quickstart"]),
        (["lcprune", "completion", "z"], ["zsh"]),
    ],
)
def test_bash_completes(words: list[str], offered: list[str], script: Path, tmp_path: Path):
    (tmp_path / "my recipe.yaml").touch()
    assert completed(script, words, tmp_path) == offered


def test_bash_completes_every_command(script: Path, tmp_path: Path):
    assert completed(script, ["lcprune", ""], tmp_path) == completion.commands()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_command_and_option(shell: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(completion, "options", lambda command: [f"--of-{command}"])
    text = completion.script(shell)
    assert all(f"--of-{command}" in text for command in completion.commands())


def test_every_help_is_asked_for_once(monkeypatch: pytest.MonkeyPatch):
    completion.options.cache_clear()
    asked = []
    monkeypatch.setattr("lcprune.cli.main", lambda arguments: asked.append(arguments) or print("--config"))
    completion.script("bash")
    completion.options.cache_clear()
    assert len(asked) == len(completion.commands())


def test_commands_are_those_of_the_help():
    assert {"fit", "predict", "collapse", "plan", "recipes", "completion"} <= set(completion.commands())
    assert all(f"\n  {command}" in HELP for command in completion.commands())


@pytest.mark.parametrize("command", completion.commands())
@pytest.mark.filterwarnings("ignore:`litmodels`")
def test_help_of_every_command_ends_with_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    tail = capsys.readouterr().out.rstrip().splitlines()[-6:]
    assert any(line.startswith("  lcprune ") for line in tail)
    assert tail[-1].startswith(("  lcprune ", "  source "))


def test_unknown_shell_is_one_sentence(capsys: pytest.CaptureFixture[str]):
    assert main(["completion", "csh"]) == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "coloured"), [({"FORCE_COLOR": "1"}, True), ({"NO_COLOR": "1"}, False), ({}, False)]
)
def test_errors_are_coloured_where_that_is_wanted(setting: dict[str, str], coloured: bool):
    outside = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    result = subprocess.run(
        [sys.executable, "-m", "lcprune", "nonsense"], env=outside | setting, capture_output=True, text=True, timeout=60
    )
    assert ("\x1b" in result.stderr) == coloured
    assert "'nonsense' is not a command" in result.stderr
