"""What the README shows can be typed: its commands parse, its Python runs (on a tiny model), its files exist."""

import json
import math
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pytest
from lightning.pytorch import Callback, Trainer
from transformers import PreTrainedModel

import lcprune
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
HELPS = re.findall(r"`lcprune (fit --[\w.]+\.help) (\w+)`", README)
FOLDED = re.compile(r"^<details><summary>[^\n]+</summary>\n\n(.*?)\n\n</details>\n+", re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)


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
    assert len(HELPS) >= 1
    assert sum("my-model" in block for block in PYTHON) == 3


def test_readme_is_short_where_it_is_unfolded():
    assert len(FOLDED.sub("", README).splitlines()) < 500


def test_folded_part_of_the_readme_is_markdown_with_a_title():
    assert FOLDED.search(README) is not None
    assert "details>" not in FOLDED.sub("", README)
    assert "details>" not in "".join(FOLDED.findall(README))


def test_line_of_the_readme_is_no_longer_than_128_characters_outside_of_tables_and_code():
    assert [line for line in PROSE.splitlines() if len(line) > 128 and not line.startswith("|")] == []


def test_tree_of_the_readme_has_every_room():
    rooms = {path.parent.name for path in (ROOT / "lcprune").glob("*/__init__.py")}
    tree = re.search(r"^```\nlcprune/ (.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert tree is not None
    assert set(re.findall(r"^  (\w+)/ ", tree[1], re.MULTILINE)) == rooms


def test_memory_in_the_readme_is_that_of_the_overlay():
    overlay = (ROOT / "recipes" / "models" / "llama-3.2-1b.yaml").read_text(encoding="utf-8")
    memory = next(line for line in overlay.splitlines() if line.startswith("# Memory:"))
    said = README.partition("**What it takes.**")[2].partition("\n\n")[0]
    assert re.findall(r"\d+\.\d+(?= GiB| more)", said) == re.findall(r"\d+\.\d+(?= GiB| more)", memory)


@pytest.mark.parametrize(("command", "name"), HELPS)
def test_help_of_a_class_in_the_readme_shows_its_settings(command: str, name: str, capsys: pytest.CaptureFixture[str]):
    with suppress(SystemExit):
        main([*shlex.split(command), name])
    shown = capsys.readouterr().out
    assert name in shown
    assert {field.name for field in fields(getattr(lcprune, name)) if f".{field.name} " not in shown} == set()


def test_texts_of_the_readme_are_written_as_the_benchmarks_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # As the hub has them: WikiText's blank lines are empty, GSM8K has its own names.
    sets = {
        "Salesforce/wikitext": {"text": ["", " = A = \n", "", " Caf\u00e9 <unk> . \n"]},
        "openai/gsm8k": {"question": ["1 + 1?"], "answer": ["2"]},
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: datasets.Dataset.from_dict(sets[name]))
    monkeypatch.chdir(tmp_path)
    exec(compile(next(block for block in PYTHON if "load_dataset" in block), "README.md", "exec"), {})
    written = Path("wikitext2_tokens_valid.txt").read_text(encoding="utf-8")
    assert written == " \n = A = \n \n Caf\u00e9 <unk> . \n"
    rows = [json.loads(line) for line in Path("gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"prompt": "1 + 1?", "response": "2"}]


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
    # As GitHub makes anchors: punctuation goes, blanks become hyphens.
    headings = [re.sub(r"[^\w -]", "", heading) for heading in re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)]
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
