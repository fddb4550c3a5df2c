"""What `--help` says of lcprune's own settings and classes."""

import re
from inspect import isabstract
from pkgutil import resolve_name

import pytest

from lcprune.cli import main

OURS = re.compile(r"--(model|data|collapse)\.")
OPTION = re.compile(r"^  (-.*?)(?:  +(\S.*))?$")
# Those that have fields.
CLASSES = {
    "collapse.schedule": ("AtSteps", "EveryNSteps", "Evenly", "ByTokens", "WhenRecovered"),
    "collapse.planner": (
        *("FixedPlan", "OneShotRanking", "ThresholdPlanner", "ProgressivePlanner"),
        *("GreedyPlanner", "RefitSearch"),
    ),
    "collapse.operator": ("Concat",),
    "collapse.refit": ("RidgeRefit",),
    "model.objective": ("Boundary", "Labels", "Local", "Logits"),
    "model.lr_scheduler": ("RewarmingCosine", "RewarmingWSD"),
    "trainer.callbacks": ("Throughput",),
    **dict.fromkeys(("collapse.stages", "data.generate", "data.mixture", "model.lora", "model.phases"), ("",)),
}


def _shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Every option that a command's help lists -> what it says of it, on one line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    options: dict[str, str] = {}
    last = None
    for line in capsys.readouterr().out.splitlines():
        if match := OPTION.match(line):
            last = match[1]
            options[last] = match[2] or ""
        elif last is not None and line.startswith(" " * 8):
            options[last] += " " + line.strip()
        else:
            last = None
    return {name: text.strip() for name, text in options.items()}


def _wordless(options: dict[str, str]) -> list[str]:
    return [name for name, text in options.items() if not text or text.startswith(("(type", "(required"))]


def test_fit_help_explains_every_setting_of_ours(capsys: pytest.CaptureFixture[str]):
    options = {name: text for name, text in _shown(["fit", "--help"], capsys).items() if OURS.match(name)}
    assert len(options) > 50
    assert _wordless(options) == []


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in CLASSES.items() for name in names])
def test_class_help_explains_every_field(key: str, name: str, capsys: pytest.CaptureFixture[str]):
    options = _shown(["fit", f"--{key}.help", *([name] if name else [])], capsys)
    assert options
    assert _wordless(options) == []


OWN = ("plan", "data", "score", "cache", "collapse", "collapse-checkpoint", "evaluate", "report", "export")


def _help(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_every_command_says_first_what_it_does(capsys: pytest.CaptureFixture[str]):
    verbs = "Shows|Scores|Runs|Shortens|Merges|measures|shows|turns"
    texts = {command: _help(command, capsys).partition(" options: ")[0] for command in OWN}
    said = {command: match[0] for command, text in texts.items() if (match := re.search(rf"\b({verbs}) .*?\.", text))}
    assert said.keys() == set(OWN)
    assert len(set(said.values())) == len(OWN)


@pytest.mark.parametrize("command", ["score", "report", "cache", "evaluate"])
def test_dtype_of_a_command_that_writes_no_model_speaks_of_none(command: str, capsys: pytest.CaptureFixture[str]):
    text = _help(command, capsys).partition("--dtype DTYPE ")[2].partition(" --")[0]
    assert "float32, bfloat16" in text
    assert not re.search("written|merg|refit", text.partition("example")[0])


@pytest.mark.parametrize(("command", "targets"), [("collapse", 4), ("collapse-checkpoint", 3)])
def test_target_depth_does_not_count_the_options_beside_it(
    command: str, targets: int, capsys: pytest.CaptureFixture[str]
):
    text = _help(command, capsys)
    assert len(set(re.findall(r"--(?:target-\w+|max-\S+) [A-Z]", text))) == targets
    assert "Number of layers to keep, or a share of them such as 75%" in text
    assert "; default, if no target is given: where the recipe's schedule ends." in text


def test_fit_help_offers_no_class_that_is_abstract(capsys: pytest.CaptureFixture[str]):
    text = " ".join(_shown(["fit", "--help"], capsys).values())
    offered = re.findall(r"lcprune\.[\w.]+\b(?=[,)])", text)
    assert {"lcprune.Evenly", "lcprune.Drop", "lcprune.Logits", "lcprune.RewarmingCosine"} <= set(offered)
    assert [name for name in offered if isabstract(resolve_name(name))] == []
