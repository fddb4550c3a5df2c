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


def test_fit_help_offers_no_class_that_is_abstract(capsys: pytest.CaptureFixture[str]):
    text = " ".join(_shown(["fit", "--help"], capsys).values())
    offered = re.findall(r"lcprune\.[\w.]+\b(?=[,)])", text)
    assert {"lcprune.Evenly", "lcprune.Drop", "lcprune.Logits", "lcprune.RewarmingCosine"} <= set(offered)
    assert [name for name in offered if isabstract(resolve_name(name))] == []
