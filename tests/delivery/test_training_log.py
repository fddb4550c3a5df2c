"""The log of a run: points at the steps that are done, merges among them, pieces of a resumed run put together."""

from pathlib import Path

import pytest

from lcprune.cli.records import keep_metrics
from lcprune.delivery import training_log
from lcprune.errors import InputError
from tests.delivery.run_folders import METRICS

HEAD = "depth,epoch,step,train/loss\n"


def rows(first: int, last: int, loss: float) -> str:
    return "".join(f"4.0,0,{at},{loss}\n" for at in range(first, last))


def test_point_lies_where_its_optimizer_step_is_done(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    assert training_log.read(tmp_path).points("train/loss") == ((1, 0.9), (2, 0.8), (3, 1.2), (4, 1.0))


def test_merges_are_marked_at_their_steps_with_the_depth_after_them(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    assert training_log.read(tmp_path).merges == ((0, 5), (2, 3))


def test_perplexity_right_after_a_merge_follows_the_one_before_it(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    assert training_log.read(tmp_path).points("val/perplexity") == ((0, 30.0), (2, 25.0), (2, 40.0))


def test_resumed_run_goes_on_where_its_checkpoint_was(tmp_path: Path):
    (tmp_path / "metrics.1.csv").write_text(HEAD + rows(0, 5, 1.0))
    (tmp_path / "metrics.2.csv").write_text(HEAD + rows(3, 9, 2.0))
    (tmp_path / "metrics.csv").write_text(HEAD + rows(6, 8, 3.0))
    log = training_log.read(tmp_path)
    assert [value for _, value in log.points("train/loss")] == [1.0] * 3 + [2.0] * 3 + [3.0] * 2
    assert [done for done, _ in log.points("train/loss")] == list(range(1, 9))
    assert log.resumes == (3, 6)


def test_tenth_piece_comes_behind_the_second(tmp_path: Path):
    for number in range(1, 11):
        (tmp_path / f"metrics.{number}.csv").write_text(HEAD + rows(number, number + 1, float(number)))
    assert [value for _, value in training_log.read(tmp_path).points("train/loss")] == list(map(float, range(1, 11)))


def test_half_a_row_of_a_killed_run_is_left_out(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text(HEAD + "4.0,0,0,1.0\n4.0,0")
    assert training_log.read(tmp_path).points("train/loss") == ((1, 1.0),)


def test_loss_that_is_no_number_is_told_and_not_drawn(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text(HEAD + "4.0,0,0,1.0\n4.0,0,1,nan\n")
    log = training_log.read(tmp_path)
    assert (log.diverged, log.points("train/loss")) == (2, ((1, 1.0),))


def test_nothing_logged_is_an_empty_log(tmp_path: Path):
    assert training_log.read(tmp_path).series == {}


def test_file_that_is_no_text_is_refused_by_name(tmp_path: Path):
    (tmp_path / "metrics.csv").write_bytes(b"step\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"metrics\.csv"):
        training_log.read(tmp_path)


def test_metrics_of_a_resumed_run_never_replace_older_ones(tmp_path: Path):
    for name, text in (("metrics.csv", "new"), ("metrics.2.csv", "old"), ("metrics.old.csv", "else")):
        (tmp_path / name).write_text(text)
    keep_metrics(tmp_path)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"metrics.3.csv": "new", "metrics.2.csv": "old", "metrics.old.csv": "else"}
