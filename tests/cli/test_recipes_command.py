"""`lcprune recipes`: lists what there is, hands out copies, overwrites nothing; named where a recipe is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

from lcprune.cli import main, recipes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_recipes_lists_every_recipe_and_overlay_with_its_headline(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    files = [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "models").glob("*.yaml")]
    assert len(files) >= 17
    assert all(file.stem in shown for file in files)
    assert "from 30 to 24 layers in three merges while it trains, taught by the original." in shown


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yml", "models/llama-3.2-1b", "llama-3.2-1b"])
def test_recipes_copy_hands_out_the_file_itself(name: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["recipes", "copy", name]) == 0
    path = Path(capsys.readouterr().out.removeprefix("recipe: ").strip())
    assert path.read_bytes() == recipes.known()[path.stem].read_bytes()
    assert [each.name for each in here.iterdir()] == [path.name]


@pytest.mark.parametrize(("target", "lands"), [("mine", "mine/come.yaml"), ("mine/other.yaml", "mine/other.yaml")])
def test_recipes_copy_takes_a_folder_or_a_file(target: str, lands: str, here: Path):
    assert main(["recipes", "copy", "come", target]) == 0
    assert (here / lands).is_file()


def test_recipes_copy_overwrites_nothing(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "come.yaml").write_text("mine")
    assert main(["recipes", "copy", "come"]) == 2
    assert "come.yaml exists already" in capsys.readouterr().err
    assert (here / "come.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["copy", "quickstrat"], "did you mean quickstart?"),
        (["copy", "zzz"], "the recipes are best, chat, come,"),
        (["copy"], "needs the name of a recipe"),
        (["list", "come"], "leave it out"),
        (["mend"], "invalid choice: 'mend'"),
    ],
)
def test_recipes_mistake_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(["recipes", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "way"),
    [
        ("quickstart", "quickstart does not exist: `lcprune recipes copy quickstart` writes quickstart.yaml."),
        ("come.yaml", "`lcprune recipes copy come` writes come.yaml."),
        ("quikstart.yaml", "did you mean quickstart? `lcprune recipes copy quickstart` writes quickstart.yaml."),
        (
            "recipes/models/qwen3-4b.yaml",
            "`lcprune recipes copy qwen3-4b recipes/models/qwen3-4b.yaml` writes recipes/",
        ),
    ],
)
def test_missing_config_with_the_name_of_a_recipe_says_how_to_get_it(
    given: str, way: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["fit", "--config", given]) == 2
    assert way in capsys.readouterr().err


@pytest.mark.parametrize("given", ["quickstart.yml", "quikstart.yaml"])
@pytest.mark.parametrize("command", [["fit"], ["evaluate", "demo:smollm2"]])
def test_missing_config_beside_the_recipe_that_was_meant_names_it(
    command: list[str], given: str, capsys: pytest.CaptureFixture[str]
):
    recipes.copy("quickstart")
    assert main([*command, "--config", given]) == 2
    assert f"{given} does not exist, did you mean quickstart.yaml? check the path.\n" in capsys.readouterr().err


def test_unknown_recipe_is_a_path_to_check():
    assert recipes.not_there(Path("nowhere.yaml")).startswith("does not exist: check the path")


def test_recipes_imports_nothing_heavy():
    code = "import sys; from lcprune.cli import main; main(['recipes']); sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60).returncode == 0
