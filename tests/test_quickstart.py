"""The promise of the README's first screen, on the real model: `lcprune fit --config recipes/quickstart.yaml`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, python

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    recipe = ROOT / "recipes" / "quickstart.yaml"
    done = python("-m", "lcprune", "fit", "--config", recipe, cwd=folder, timeout=3000)
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_quickstart_goes_from_30_to_24_layers_in_at_least_two_merges_during_training(run: Path):
    history = json.loads((run / "runs/quickstart/figures.json").read_text())["history"]
    assert history["teacher_depth"] == 30
    assert json.loads((run / "runs/quickstart/student/config.json").read_text())["num_hidden_layers"] == 24
    assert len({step["global_step"] for step in history["steps"]}) >= 2


def test_quickstart_wins_back_at_least_a_third_of_the_perplexity_after_the_last_merge(run: Path):
    figures = json.loads((run / "runs/quickstart/figures.json").read_text())
    after_last_merge = figures["history"]["steps"][-1]["measured"]["val/perplexity"]
    assert figures["final"]["val/perplexity"] <= after_last_merge * 2 / 3


def test_quickstart_ends_with_a_table_that_says_so(run: Path):
    text = (run / "stdout.txt").read_text()
    assert "teacher" in text
    assert "student" in text
    assert "since the last merge" in text


def test_quickstart_student_generates_with_plain_transformers(run: Path):
    folder = str(run / "runs/quickstart/student")
    code = (
        "import sys; sys.modules['lcprune'] = None\n"
        "from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
        f"m, t = A.from_pretrained({folder!r}), T.from_pretrained({folder!r})\n"
        "i = t('A class definition', return_tensors='pt')\n"
        "print(m.generate(**i, max_new_tokens=20, do_sample=False, use_cache=True).shape[1] - i['input_ids'].shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 1
