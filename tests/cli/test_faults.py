"""What a run meets: each fault ends in one sentence and its status, and costs at most the steps since a checkpoint."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcprune.cli import failures, main
from lcprune.distillation import storing
from lcprune.distillation.checkpoint import read
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.storing import newest_whole
from tests.cli.recipe import checkpointed, recipe, text_file, write

ROOT = Path(__file__).parents[2]


def _fit(config: Path, *options: str) -> int:
    return main(["fit", "--config", str(config), *options])


def _student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "student" / "model.safetensors")


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return "\n".join(line for line in capsys.readouterr().err.splitlines() if line.startswith("lcprune: "))


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the run exports that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    assert _fit(checkpointed(tiny_folder, folder)) == 0
    return _student(folder)


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Does something in the forward pass of one optimizer step; undone by `monkeypatch.undo`."""

    def arrange(step: int, act: Callable[[], object]) -> None:
        real = DistillationModule.training_step

        def training_step(self: DistillationModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            if self.trainer.global_step + 1 == step:
                act()
            return real(self, batch, batch_idx)

        monkeypatch.setattr(DistillationModule, "training_step", training_step)

    return arrange


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_sigterm_ends_with_143_and_the_run_goes_on_as_if_nothing_had_been(
    tiny_folder: Path,
    tmp_path: Path,
    whole: dict[str, torch.Tensor],
    in_step: Callable[[int, Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    in_step(4, _terminate)
    config = checkpointed(tiny_folder, tmp_path)
    path = tmp_path / "run" / "checkpoints" / "sigterm.ckpt"
    assert _fit(config) == 143
    assert _said(capsys) == f"lcprune: stopped by SIGTERM after optimizer step 4: go on with --ckpt_path {path}."
    assert not (tmp_path / "run" / "student").exists()
    monkeypatch.undo()
    assert _fit(config, "--ckpt_path", "last") == 0
    assert f"--ckpt_path last: {path}" in _said(capsys)
    assert _equal(_student(tmp_path), whole)


@pytest.fixture
def broken_off(
    tiny_folder: Path,
    tmp_path: Path,
    in_step: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Path:
    """The checkpoints of a run that was stopped after step 4."""
    in_step(4, _terminate)
    assert _fit(checkpointed(tiny_folder, tmp_path)) == 143
    monkeypatch.undo()
    capsys.readouterr()
    return tmp_path / "run" / "checkpoints"


def test_last_passes_over_damaged_checkpoints_and_says_so(
    broken_off: Path, tiny_folder: Path, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
):
    for name in ("sigterm", "last", "step=4"):
        _spoil(broken_off / f"{name}.ckpt")
    folder = broken_off.parents[1]
    assert _fit(checkpointed(tiny_folder, folder), "--ckpt_path", "last") == 0
    said = _said(capsys)
    assert f"--ckpt_path last: {broken_off / 'step=3.ckpt'} (" in said
    assert f"{broken_off / 'sigterm.ckpt'}" in said
    assert "newer, but not whole)" in said
    assert _equal(_student(folder), whole)


def _cut() -> None:
    raise OSError(5, "the machine is gone")


def test_last_is_no_checkpoint_of_the_run_before_where_a_new_one_was_cut_before_its_first(
    broken_off: Path,
    tiny_folder: Path,
    in_step: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
):
    folder = broken_off.parents[1]
    config = checkpointed(tiny_folder, folder)
    in_step(1, _cut)
    with pytest.raises(OSError, match="the machine is gone"):
        _fit(config)
    monkeypatch.undo()
    in_step(3, _cut)
    with pytest.raises(OSError, match="the machine is gone"):
        _fit(config, "--ckpt_path", "last")
    said = _said(capsys)
    assert "--ckpt_path last: no checkpoint yet in" in said
    assert f"{broken_off / 'sigterm.ckpt'}" in said
    assert "of the run before this one)" in said
    monkeypatch.undo()
    assert _fit(config, "--ckpt_path", "last") == 0
    assert f"--ckpt_path last: {broken_off / 'last-v1.ckpt'}" in _said(capsys)  # of step 2
    assert _equal(_student(folder), whole)


def test_last_is_found_where_a_metric_in_its_name_makes_a_folder(
    tiny_folder: Path,
    tmp_path: Path,
    in_step: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
):
    saving = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}-{val/perplexity:.1f}"}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    config = checkpointed(tiny_folder, tmp_path, trainer__callbacks=[callback])
    in_step(5, _cut)
    with pytest.raises(OSError, match="the machine is gone"):
        _fit(config)
    monkeypatch.undo()
    (path,) = (tmp_path / "run" / "checkpoints" / "step=4-val").iterdir()
    assert _fit(config, "--ckpt_path", "last") == 0
    assert f"--ckpt_path last: {path}" in _said(capsys)
    assert _equal(_student(tmp_path), whole)
    in_step(1, _cut)
    with pytest.raises(OSError, match="the machine is gone"):
        _fit(config)
    monkeypatch.undo()
    assert _fit(config, "--ckpt_path", "last") == 0
    said = _said(capsys)
    assert "no checkpoint yet in" in said
    assert str(path) in said.partition("of the run before this one")[0]


def _lighten(path: Path) -> None:
    """Leaves the weights alone, as `save_weights_only` does, and makes it the newest."""
    checkpoint = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in checkpoint.items() if name != "optimizer_states"}, path)


def test_last_passes_over_checkpoints_of_weights_alone_and_says_so(
    broken_off: Path, tiny_folder: Path, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
):
    _lighten(broken_off / "step=3.ckpt")
    folder = broken_off.parents[1]
    assert _fit(checkpointed(tiny_folder, folder), "--ckpt_path", "last") == 0
    said = _said(capsys)
    assert f"--ckpt_path last: {broken_off / 'sigterm.ckpt'} (" in said
    assert f"{broken_off / 'step=3.ckpt'} newer, but weights without the optimizer's state)" in said
    assert _equal(_student(folder), whole)


@pytest.mark.parametrize("named", ["last", "step=3.ckpt"])
def test_weights_alone_are_refused_as_the_beginning_of_a_run(
    broken_off: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], named: str
):
    for path in broken_off.glob("*.ckpt"):
        _lighten(path) if path.name == "step=3.ckpt" else path.unlink()
    folder = broken_off.parents[1]
    path = named if named == "last" else str(broken_off / named)
    assert _fit(checkpointed(tiny_folder, folder), "--ckpt_path", path) == 2
    assert "without the optimizer's state (save_weights_only)" in _said(capsys)


def test_damaged_checkpoint_is_refused_and_the_newest_whole_one_named(
    broken_off: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
):
    _spoil(broken_off / "sigterm.ckpt")
    _spoil(broken_off / "last.ckpt")
    folder = broken_off.parents[1]
    assert _fit(checkpointed(tiny_folder, folder), "--ckpt_path", str(broken_off / "last.ckpt")) == 2
    assert f"the newest whole one in its folder is {broken_off / 'step=4.ckpt'}, name that." in _said(capsys)


def test_damaged_checkpoint_is_not_exported(broken_off: Path, capsys: pytest.CaptureFixture[str]):
    _spoil(broken_off / "sigterm.ckpt")
    assert main(["export", str(broken_off / "sigterm.ckpt"), "--out", str(broken_off / "short")]) == 2
    assert "not a whole checkpoint" in _said(capsys)
    assert not (broken_off / "short").exists()


def test_last_of_damaged_checkpoints_alone_is_refused(
    broken_off: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
):
    for path in broken_off.iterdir():
        _spoil(path)
    assert _fit(checkpointed(tiny_folder, broken_off.parents[1]), "--ckpt_path", "last") == 2
    assert "ckpt_path=last: no checkpoint is whole" in _said(capsys)


def test_last_without_checkpoints_begins_a_run(
    tiny_folder: Path, tmp_path: Path, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
):
    assert _fit(checkpointed(tiny_folder, tmp_path), "--ckpt_path", "last") == 0
    assert "no checkpoint yet in" in _said(capsys)
    assert _equal(_student(tmp_path), whole)


def test_full_disk_at_a_checkpoint_leaves_the_one_before(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The kernel refuses to let a file grow: what a full disk does, without one."""
    real, limits = torch.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(content: dict[str, object], file: object) -> None:
        full = content["global_step"] == 3
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else limits[0], limits[1]))
        try:
            real(content, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(storing.torch, "save", save)
    assert _fit(checkpointed(tiny_folder, tmp_path)) == 1
    said = _said(capsys)
    assert "step=3.ckpt cannot be written (File too large)" in said
    assert "make room, then go on with --ckpt_path last." in said
    folder = tmp_path / "run" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step=1.ckpt", "step=2.ckpt", "last.ckpt"}
    assert newest_whole(folder)[1] == []
    assert read(folder / "last.ckpt").history.depth == 5


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_sigterm_in_an_export_leaves_nothing_behind(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
):
    config = str(write(tmp_path, recipe(tiny_folder, text_file(tmp_path), tmp_path / "run")))
    before = sorted(tmp_path.rglob("*"))
    written: list[Path] = []

    def write_account(folder: Path, *given: object, **named: object) -> None:
        written.extend(folder.glob("*.safetensors"))
        _terminate()
        _terminate()  # a second one breaks nothing off

    monkeypatch.setattr("lcprune.delivery.export._write_account", write_account)
    assert main(["collapse", "--config", config, "--out", str(tmp_path / "short"), *flags]) == 143
    assert _said(capsys) == "lcprune: stopped by SIGTERM: run the command again."
    assert written
    assert sorted(tmp_path.rglob("*")) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_loss_that_is_no_number_is_one_sentence_and_leaves_the_last_good_checkpoint(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    real = DistillationModule._taught

    def taught(self: DistillationModule, *arguments: object) -> object:
        if self.trainer.global_step == 2:
            self.student.model.norm.weight.data[0] = torch.nan
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DistillationModule, "_taught", taught)
    assert _fit(checkpointed(tiny_folder, tmp_path)) == 1
    said = _said(capsys)
    assert "optimizer step 3: the loss is nan in batch 2 of epoch 0 (training blocks " in said
    assert "\n" not in said
    folder = tmp_path / "run" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step=1.ckpt", "step=2.ckpt", "last.ckpt"}


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


@pytest.mark.parametrize("act", [_out_of_memory, lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)])
def test_no_memory_is_one_sentence_that_says_what_to_lower(
    tiny_folder: Path,
    tmp_path: Path,
    in_step: Callable[[int, Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
    act: Callable[[], object],
):
    in_step(2, act)
    assert _fit(checkpointed(tiny_folder, tmp_path)) == 1
    said = _said(capsys)
    assert said.startswith("lcprune: not enough memory (")
    assert "lower data.batch_size" in said
    assert "model.activations: recompute" in said
    assert newest_whole(tmp_path / "run" / "checkpoints")[0] is not None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), "another rank"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "not enough memory"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("size mismatch"), None),
        (ValueError("out of memory of old times"), None),
    ],
)
def test_errors_of_the_machine_are_told_from_defects(error: Exception, words: str | None):
    said = failures.sentence(error)
    assert said is None if words is None else words in str(said)
