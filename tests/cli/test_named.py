"""A recipe names classes of its families; whatever else Python can import is refused before it is called."""

from pathlib import Path

import pytest
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD

from lcprune.cli import main, named
from lcprune.errors import InputError
from tests.cli.recipe import recipe, text_file, write


def shell(folder: Path) -> dict[str, object]:
    return {"class_path": "os.system", "init_args": {"command": f"touch {folder / 'ran'}"}}


def popen(folder: Path) -> dict[str, object]:
    return {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(folder / "ran")]}}


def of_callback(given: object) -> list[dict[str, object]]:
    return [{"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": given}}]


# jsonargparse 4.53 announces that version 5 will refuse some of these names by itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("place", "make"),
    [
        ("model__optimizer", popen),
        ("model__optimizer", lambda folder: "os.system"),
        ("model__optimizer", lambda folder: "builtins.exec"),
        ("model__lr_scheduler", shell),
        ("model__lr_scheduler", popen),
        ("model__lr_scheduler", lambda folder: {"class_path": "LambdaLR", "init_args": {"lr_lambda": shell(folder)}}),
        ("collapse__planner", popen),
        (
            "collapse__planner",
            lambda folder: {"class_path": "OneShotRanking", "init_args": {"criterion": shell(folder)}},
        ),
        ("collapse__operator", shell),
        ("collapse__refit", shell),
        ("collapse__schedule", popen),
        ("model__objective", lambda folder: [shell(folder)]),
        ("model__lora", shell),
        ("data__generate", popen),
        ("trainer__callbacks", lambda folder: [shell(folder)]),
        ("trainer__callbacks", lambda folder: of_callback(shell(folder))),
        ("trainer__callbacks", lambda folder: of_callback("os.system")),
        ("trainer__callbacks", lambda folder: of_callback("builtins.exit")),
        ("trainer__logger", shell),
        ("trainer__logger__dict_kwargs", lambda folder: {"more": popen(folder)}),
        ("trainer__profiler", popen),
        ("trainer__strategy", shell),
        ("trainer__plugins", popen),
    ],
)
def test_what_is_no_class_of_a_family_is_refused_and_never_called(
    place: str, make: object, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content = recipe(tiny_folder, text_file(tmp_path), tmp_path / "run", **{place: make(tmp_path)})  # type: ignore[operator]
    assert main(["fit", "--config", str(write(tmp_path, content))]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lcprune: ")]
    assert len(said) == 1
    assert place.removesuffix("__dict_kwargs").replace("__", ".") in said[0]
    assert "is not a class that" in said[0]
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        Namespace(class_path="lcprune.merging.operators.Drop", init_args=Namespace(keep="first")),
        Namespace(class_path="torch.optim.AdamW"),
        Namespace(class_path="torch.optim.lr_scheduler.OneCycleLR"),
        Namespace(class_path="lightning.pytorch.cli.ReduceLROnPlateau"),
        Namespace(class_path="lightning.pytorch.loggers.CSVLogger"),
        Namespace(class_path="lightning.pytorch.callbacks.ModelCheckpoint"),
        Namespace(class_path="lightning.pytorch.strategies.ModelParallelStrategy"),
        Namespace(class_path="lightning.pytorch.plugins.environments.SLURMEnvironment"),
        Namespace(class_path="lightning.pytorch.callbacks.progress.rich_progress.RichProgressBarTheme"),
        Namespace(class_path="lcprune.data.generate.Generate"),
        Namespace(optimizer=SGD, callbacks=[ModelCheckpoint()], config=[main], number=3, nothing=None),
    ],
)
def test_class_of_a_family_may_be_named(settings: Namespace):
    named.check(Namespace(model=settings))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (Namespace(a=Namespace(class_path="os.path.join")), "a=os.path.join"),
        (Namespace(a=[1, {"b": Namespace(class_path="pathlib.Path")}]), "a.1.b=pathlib.Path"),
        (Namespace(a=Namespace(class_path="no.such.Class")), "a=no.such.Class"),
        (Namespace(a=Namespace(class_path="", init_args=Namespace())), "a="),
        (Namespace(a=Namespace(class_path="SGD", init_args=Namespace(b=print))), "a=SGD"),
        (Namespace(a=Namespace(class_path="torch.optim.SGD", init_args=Namespace(b=print))), "a.b=print"),
    ],
)
def test_anything_else_is_refused_by_its_setting(settings: Namespace, key: str):
    with pytest.raises(InputError, match=f"^{key} is not a class that a recipe may name: .* never a function"):
        named.check(settings)
