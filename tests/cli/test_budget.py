"""`collapse` to a budget in the user's terms: what comes out keeps to it, mistakes are found before weights load."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lcprune.cli import main
from lcprune.merging.lineage import MergeHistory
from lcprune.merging.within import MEASURED, ORIGINAL
from tests.builders import save_tiny, tiny_llama
from tests.cli.recipe import recipe, text_file, write

pytestmark = pytest.mark.filterwarnings("ignore:`litmodels`", "ignore:The `srun` command")

RATIO = ("--max-perplexity-ratio", "1.3")
BUDGETS = (("--target-depth", "4"), ("--target-params", "40K"), ("--target-size", "100KB"), RATIO)
GREEDY = {"class_path": "lcprune.merging.greedy.GreedyPlanner", "init_args": {"candidates": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A six-layer Llama whose weights are stored in bfloat16."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", tiny_llama(dtype=torch.bfloat16))


@pytest.fixture
def collapse(folder: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the command in `tmp_path`, into `short`."""

    def run(*arguments: str, **changes: object) -> int:
        changes = {"collapse__planner": "OneShotRanking", **changes}
        config = write(tmp_path, recipe(folder, text_file(tmp_path), tmp_path / "run", **changes))
        return main(["collapse", "--config", str(config), "--out", str(tmp_path / "short"), *arguments])

    return run


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        pytest.fail("weights were loaded before the mistake was found")

    monkeypatch.setattr("lcprune.cli.options.load", never)
    monkeypatch.setattr("lcprune.cli.streaming.StoredModel", never)


def parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("flags", [(), ("--stream",)], ids=["", "stream"])
def test_parameters_are_kept(
    flags: tuple[str, ...], collapse: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert collapse("--target-params", "45K", *flags) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    assert parameters(student) <= 45_000 < parameters(tiny_llama(student.config.num_hidden_layers + 1))
    assert "\n4 of 6 layers, 40.3 K of 58.8 K parameters, " in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--stream",)], ids=["", "stream"])
def test_size_is_that_of_the_files_in_the_dtype_of_the_original(
    flags: tuple[str, ...], collapse: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    # Planned in float32, where 95 kB are a layer; stored in bfloat16, where they are four.
    assert collapse("--target-size", "95KB", "--dtype", "float32", *flags) == 0
    file = tmp_path / "short" / "model.safetensors"
    assert file.stat().st_size <= 95_000
    assert MergeHistory.load(tmp_path / "short" / "history.json").depth == 4
    assert f"parameters, {file.stat().st_size / 1000:.1f} KB of " in capsys.readouterr().out


@pytest.mark.parametrize("planner", ["OneShotRanking", GREEDY], ids=str)
def test_perplexity_is_kept_and_printed(
    planner: object, collapse: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert collapse(*RATIO, collapse__planner=planner) == 0
    history = MergeHistory.load(tmp_path / "short" / "history.json")
    found, original = history.steps[-1].measured[MEASURED], history.steps[-1].measured[ORIGINAL]
    assert original < found <= 1.3 * original
    printed = capsys.readouterr().out
    assert f"\n{history.depth} of 6 layers, " in printed
    assert f"perplexity {original:.4g} -> {found:.4g}, {found / original:.4g} times the original's" in printed


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (("--target-depth", "66%"), {}),
        ((), {"collapse__schedule": {"class_path": "Evenly", "init_args": {"target_depth": "66%"}}}),
    ],
    ids=["option", "schedule"],
)
def test_share_of_the_layers_is_a_depth(
    flags: tuple[str, ...], changes: dict[str, object], collapse: Callable[..., int], tmp_path: Path
):
    plan = tmp_path / "plan.json"
    assert collapse(*flags, "--plan-only", "--out", str(plan), **changes) == 0
    assert MergeHistory.load(plan).depth == 4


def test_plan_only_says_what_the_plan_will_amount_to(
    collapse: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plan = tmp_path / "plan.json"
    assert collapse("--target-size", "95KB", "--plan-only", "--out", str(plan)) == 0
    assert MergeHistory.load(plan).depth == 4
    assert "\n4 of 6 layers, 40.3 K of 58.8 K parameters, 80.5 KB of 117.6 KB\n" in capsys.readouterr().out


def test_progress_is_on_stderr(collapse: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    changes = {"collapse__refit": "MagnitudeCompensation", "collapse__planner": GREEDY}
    assert collapse("--target-depth", "4", **changes) == 0
    shown = capsys.readouterr()
    stages = [line.partition(" in ")[0] for line in shown.err.splitlines() if line.endswith(" s")]
    assert {"trying merges of 6 layers: 1", "merging layers: 2"} <= set(stages)
    assert "\x1b" not in shown.err
    assert "trying merges" not in shown.out


def test_progress_of_streaming_is_on_stderr(collapse: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    assert collapse("--stream") == 0
    assert "merging and writing layers: 4 in " in capsys.readouterr().err


def test_help_has_every_budget_with_an_example(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["collapse", "--help"])
    text = capsys.readouterr().out
    given, examples = text.split("an example of each:")
    for option, _ in BUDGETS:
        assert f"{option} " in given
        assert any(
            "lcprune collapse --config recipes/best.yaml" in line for line in examples.splitlines() if option in line
        )


# What is typed beside --out, what is changed in the recipe, and what the sentence has to say.
MISTAKES: dict[str, tuple[tuple[str, ...], dict[str, object], tuple[str, ...]]] = {
    "share above all": (
        ("--target-depth", "175%"),
        {},
        ("target_depth='175%'", '"75%"', "give another --target-depth"),
    ),
    "two budgets": (BUDGETS[0] + BUDGETS[1], {}, ("target_depth and target_params", "give one of them")),
    "no number of parameters": (("--target-params", "1OOM"), {}, ("target_params=1OOM", "number", "100M")),
    "no size": (("--target-size", "200MBit"), {}, ("target_size=200MBit", "GiB", "200MB")),
    "no ratio": (("--max-perplexity-ratio", "abc"), {}, ("--max-perplexity-ratio", "'abc' is no number", "1.3")),
    "ratio of one": (("--max-perplexity-ratio", "1"), {}, ("max_perplexity_ratio=1.0", "above 1", "1.3")),
    "too few parameters": (("--target-params", "1K"), {}, ("target_params=1K is less", "ask for 12.5K or more")),
    "too many parameters": (("--target-params", "1B"), {}, ("target_params=1B", "58.8K", "ask for less")),
    "too small": (("--target-size", "1KB"), {}, ("target_size=1KB is less", "KB or more")),
    "float32 would be too large": (("--target-size", "200KB"), {}, ("target_size=200KB", "ask for less")),
    "plan that leaves more": (
        BUDGETS[1],
        {"collapse__planner": {"class_path": "FixedPlan", "init_args": {"groups": [[2, 3]]}}},
        ("leave 5 layers", "target depth 3"),
    ),
    "streamed ratio": ((*RATIO, "--stream"), {}, ("--max-perplexity-ratio", "--target-params", "leave --stream out")),
    "ratio without a layer to try": (
        RATIO,
        {"collapse__planner": {"class_path": "OneShotRanking", "init_args": {"spare_first": 3, "spare_last": 3}}},
        ("spare_first=3",),
    ),
    "no budget at all": ((), {"collapse__schedule": None}, ("How short?", *(option for option, _ in BUDGETS))),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_sentence_before_weights_are_loaded(
    name: str, collapse: Callable[..., int], no_weights: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments, changes, expected = MISTAKES[name]
    assert collapse(*arguments, **changes) == 2
    error = capsys.readouterr().err
    assert error.startswith("lcprune: ")
    assert error.count("\n") == 1
    assert all(part in error for part in expected), error
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize(("option", "value"), BUDGETS)
def test_budget_beside_a_plan_is_refused(option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format": 1, "teacher_depth": 6, "steps": []}))
    assert main(["collapse", "--plan", str(plan), option, value, "--out", str(tmp_path / "short")]) == 2
    assert f"{option} means nothing beside it: give one of them" in capsys.readouterr().err


def test_model_of_one_layer_is_refused(tmp_path: Path, no_weights: None, capsys: pytest.CaptureFixture[str]):
    model = save_tiny(tmp_path / "model", tiny_llama(1))
    config = write(tmp_path, recipe(model, text_file(tmp_path), tmp_path / "run", collapse__planner=GREEDY))
    assert main(["collapse", "--config", str(config), "--out", str(tmp_path / "short"), *RATIO]) == 2
    assert "1 layer: to merge takes 2 or more" in capsys.readouterr().err


def test_perplexity_that_cannot_be_kept_says_what_the_mildest_plan_costs(
    collapse: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert collapse("--max-perplexity-ratio", "1.001") == 2
    assert "max_perplexity_ratio=1.001 cannot be kept: the mildest plan" in capsys.readouterr().err
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize("flags", [(), ("--stream",)], ids=["", "stream"])
def test_planner_that_stops_above_the_budget_is_refused(
    flags: tuple[str, ...], collapse: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    # Both groups together would go below the budget, the first alone does not reach it.
    groups = {"class_path": "FixedPlan", "init_args": {"groups": [[0, 1], [2, 3, 4, 5]]}}
    assert collapse("--target-params", "45K", *flags, collapse__planner=groups) == 2
    assert "takes 4 layers, and FixedPlan" in capsys.readouterr().err
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize("budget", [(), ("--target-depth", "3"), RATIO, ("--plan-only",)])
@pytest.mark.parametrize("settings", [{"threshold": 1.0, "layers_per_merge": 2}, {"layers_per_merge": 9}])
def test_planner_that_merges_nothing_is_refused(
    settings: dict[str, float],
    budget: tuple[str, ...],
    collapse: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    planner = {"class_path": "lcprune.merging.planners.ThresholdPlanner", "init_args": settings}
    assert collapse(*budget, collapse__planner=planner) == 2
    assert "merges nothing here, and the model itself is no student: loosen" in capsys.readouterr().err
    assert not (tmp_path / "short").exists()
