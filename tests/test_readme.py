"""What the README shows can be typed: its commands parse, its Python runs (on a tiny model), its files exist."""

import math
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from transformers import PreTrainedModel

from lcprune import DistillationModule, TextDataModule
from lcprune.cli import HOMES, main
from lcprune.cli.training import RecipeCLI
from lcprune.distillation import checkpoint
from lcprune.merging import surgery
from lcprune.merging.lineage import MergeStep
from lcprune.merging.operators import from_spec, spec_of
from lcprune.models import load_tokenizer
from tests.builders import save_tiny, tiny_llama
from tests.cli.recipe import text_file

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
COMMANDS = re.findall(r"^(lcprune [^#\n]*)", SHELL, re.MULTILINE)
BENCHMARKS = re.findall(r"python (tests/benchmarks/\w+\.py)((?: +(?!#)[^`#\n]*)?)", README)
TRAINING = re.findall(r"^lcprune ((?:fit|validate|test|predict) [^#\n]*)", README, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes and a data file, as the README supposes."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    text_file(tmp_path).rename(tmp_path / "my.txt")
    words = (tmp_path / "my.txt").read_text().split()
    lines = [f'{{"text": "{" ".join(words[i : i + 60])}"}}\n' for i in range(0, len(words), 60)]
    for name in ("my.jsonl", "mix.jsonl", "chat.jsonl"):
        (tmp_path / name).write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", TRAINING)
def test_command_of_the_readme_makes_every_object(command: str, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(checkpoint, "read", lambda path: None)
    cli = RecipeCLI([*shlex.split(command), "--trainer.accelerator", "cpu"])
    assert cli.trainer is not None


def test_readme_has_the_commands_and_blocks_that_these_tests_look_at():
    assert len(TRAINING) >= 4
    assert sum("my-model" in block for block in PYTHON) == 3


@pytest.mark.parametrize("block", [block for block in PYTHON if "my-model" in block])
@pytest.mark.filterwarnings("ignore:The .* does not have many workers", "ignore:`max_epochs` was not set")
def test_python_of_the_readme_runs(
    block: str, here: Path, tiny_llama: Callable[..., PreTrainedModel], tiny_tokenizer: object
):
    save_tiny(here / "my-model", tiny_llama(24))
    small = block.replace('path="my.jsonl"', 'path="my.jsonl", block_size=32')
    for long, short in {"max_steps=200": "max_steps=42", "steps=200": "steps=2"}.items():
        small = small.replace(long, short)
    exec(compile(small, "README.md", "exec"), {})
    if "steps=" in block:  # what is trained is kept
        short = DistillationModule(teacher="my-model", student="short")
        assert short.begun.depth == 20
        assert load_tokenizer("short").get_vocab() == load_tokenizer("my-model").get_vocab()


def test_operator_of_the_readme_merges(monkeypatch: pytest.MonkeyPatch):
    namespace: dict[str, object] = {"__name__": "tests.test_readme"}
    block = next(block for block in PYTHON if "class KeepNormsOfLast" in block)
    exec(compile(block, "README.md", "exec"), namespace)
    monkeypatch.setitem(globals(), "KeepNormsOfLast", namespace["KeepNormsOfLast"])
    operator = namespace["KeepNormsOfLast"]()  # type: ignore[operator]
    spec = {**spec_of(operator), "class_path": f"{__name__}.KeepNormsOfLast"}
    assert from_spec(spec) == operator

    model = tiny_llama(4)
    base, last = (
        {name: one.detach().clone() for name, one in model.model.layers[i].named_parameters()} for i in (1, 2)
    )
    surgery.apply(model, MergeStep(group=(1, 2), operator=spec, shares=(0.5, 0.5)))
    assert len(model.model.layers) == 3
    for name, merged in model.model.layers[1].named_parameters():
        assert merged.equal(last[name] if "layernorm" in name else base[name])


@pytest.mark.filterwarnings("ignore:The .* does not have many workers")
def test_term_of_the_readme_is_added_to_the_loss(here: Path):
    namespace: dict[str, Any] = {"__name__": "tests.test_readme"}
    exec(compile(next(block for block in PYTHON if "class WithZLoss" in block), "README.md", "exec"), namespace)
    save_tiny(here / "my-model", tiny_llama(4))
    losses: list[float] = []

    class Loss(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: object, outputs: Any, *others: object) -> None:
            losses.append(outputs["loss"].item())

    for kind in (DistillationModule, namespace["WithZLoss"]):
        trainer = Trainer(max_steps=1, logger=False, enable_checkpointing=False, callbacks=[Loss()], accelerator="cpu")
        trainer.fit(kind(teacher="my-model"), TextDataModule(tokenizer="my-model", path="my.jsonl", block_size=32))
    plain, added = losses
    assert plain == pytest.approx(0, abs=1e-5)  # the student is the teacher as yet
    assert 1e-4 * math.log(tiny_llama(4).config.vocab_size) ** 2 * 0.5 < added < 1


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:recipes|tests|notebooks|lcprune)/[\w./]+\w)`", README))))
def test_path_in_the_readme_exists(path: str):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_readme_has_its_options(command: str, capsys: pytest.CaptureFixture[str]):
    name, *arguments = shlex.split(command)[1:]
    assert name in HOMES
    # What a recipe can say has a dot in it and is checked by the recipe's own parser above.
    options = {one for one in arguments if one.startswith("--") and "." not in one}
    with suppress(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert {one for one in options if one not in text} == set()


@pytest.mark.parametrize(("path", "arguments"), BENCHMARKS)
def test_benchmark_of_the_readme_takes_its_options(path: str, arguments: str):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert {one for one in re.findall(r"--[\w-]+", arguments) if one not in source} == set()


@pytest.mark.parametrize("test", sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", README))))
def test_test_that_the_readme_names_exists(test: str):
    path, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("anchor", sorted(set(re.findall(r"\]\(#([\w-]+)\)", README))))
def test_link_in_the_readme_has_a_heading(anchor: str):
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
