"""The benchmark scripts on tiny random models: that they run and what their last line says, not what they measure."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import contestants, loss_speed, peers, shapes, step

TINY = ["--layers", "10", "--hidden", "64", "--vocabulary", "512", "--block-size", "16", "--device", "cpu"]


def test_step_prints_its_three_figures_last(capsys: pytest.CaptureFixture[str]):
    step.main(["--random", "llama-3.2-1b", *TINY, "--tokens", "32", "--repeats", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("overhead_ratio", "after_merge_speedup", "local_speedup"):
        assert result[name] > 0
    assert (result["merged"], result["tokens"], result["dtype"]) == ("2 pairs from layer 4", 32, "bfloat16")


def test_loss_speed_prints_every_form_that_a_cpu_computes(capsys: pytest.CaptureFixture[str]):
    sizes = ["--tokens", "40", "--vocabulary", "99", "--hidden", "16"]
    loss_speed.main([*sizes, "--repeats", "1", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["operations"]) == {"256", "1024"}
    assert result["operations"]["256"]["ms"] > 0


def test_sizes_of_a_model_that_is_not_random_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        step.main(["--layers", "3"])
    assert "--random" in capsys.readouterr().err


def test_shape_is_the_models_own():
    config = shapes.config_of("llama-3.2-1b")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size, config.head_dim) == (2048, 16, 128256, 64)


def test_shape_keeps_heads_and_the_ratio_of_channels():
    config = shapes.config_of("smollm2-135m", layers=4, hidden=36, vocabulary=99)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 4)
    assert (config.intermediate_size, config.num_hidden_layers, config.vocab_size) == (96, 4, 99)
    with pytest.raises(SystemExit, match="multiple of 18"):
        shapes.config_of("smollm2-135m", hidden=32)


def test_pairs_are_neighbours_and_fit():
    assert shapes.pairs(30, 24, 12) == [[12, 13], [14, 15], [16, 17], [18, 19], [20, 21], [22, 23]]
    with pytest.raises(SystemExit, match="from layer 12 on, 16 layers hold no 3 pairs"):
        shapes.pairs(16, 13, 12)


def _figures(seconds: float, memory_mb: float) -> dict[str, float]:
    return {"seconds": seconds, "memory_mb": memory_mb}


def test_ratios_are_of_the_best_peer_of_the_same_round():
    rounds = [
        {"ours": _figures(1, 30), "ours_after_merge": _figures(0.5, 20), "a": _figures(2, 60), "b": _figures(4, 50)},
        {"ours": _figures(3, 30), "ours_after_merge": _figures(1, 20), "a": _figures(6, 60), "b": _figures(4, 50)},
        {"ours": _figures(9, 30), "ours_after_merge": _figures(1, 20), "a": _figures(9, 60)},
    ]
    result = peers.summary(rounds, rounds)
    assert result["time_ratio"] == 0.75  # of 0.5, 0.75 and 1
    assert result["time_ratio_after_merge"] == 0.25
    assert result["memory_ratio"] == 0.6  # of 0.6, 0.6 and 0.5
    assert result["each"] == {
        "ours": _figures(3, 30),
        "ours_after_merge": _figures(1, 20),
        "a": _figures(6, 60),
        "b": _figures(4, 50),
    }


def test_nothing_to_compare_gives_no_ratio():
    alone = [{"ours": _figures(1, 30)}]
    assert peers.summary(alone, alone)["time_ratio"] is None


def test_peer_that_does_not_run_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def outcome(name: str, work: contestants.Work, environment: dict[str, str]) -> dict[str, float] | str:
        tried.append(name)
        return "ImportError: no such peer" if name == "trl_gkd" else _figures(1, 1)

    monkeypatch.setattr(peers, "elsewhere", outcome)
    rounds, failed = peers.race(["ours", "trl_gkd", "optipfair"], contestants.Work("", "", []), 2)
    assert failed == {"trl_gkd": "ImportError: no such peer"}
    assert [sorted(results) for results in rounds] == [["optipfair", "ours"]] * 2
    assert tried.count("trl_gkd") == 1


@pytest.mark.parametrize("name", ["ours", "ours_after_merge"])
def test_ours_trains_the_students_steps(tmp_path: Path, name: str):
    config = shapes.config_of("llama-3.2-1b", layers=5, hidden=64, vocabulary=64)
    teacher = str(shapes.save_random(tmp_path / "teacher", config))
    groups = shapes.pairs(5, 4, 2)
    student = str(peers.shortened(teacher, tmp_path / "student", groups))
    work = contestants.Work(teacher, student, groups, block_size=8, steps=1, warmup=1)
    figures = contestants.CONTESTANTS[name](work)
    assert figures["steps"] == 2
    assert figures["seconds"] > 0
