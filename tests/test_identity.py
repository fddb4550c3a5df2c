"""What tells one model from another."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from lcprune import identity
from tests.builders import save_tiny, tiny_llama


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCPRUNE_CACHE", str(tmp_path / "cache"))


def test_hash_of_a_large_file_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(identity, "LARGE", 1)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    first, time = identity.hash_of(path), path.stat().st_mtime_ns
    path.write_bytes(b"two")
    os.utime(path, ns=(time, time))
    assert identity.hash_of(path) == first
    os.utime(path, ns=(time, time + 1))
    assert identity.hash_of(path) == hashlib.sha256(b"two").hexdigest() != first


def test_hash_that_cannot_be_remembered_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(identity, "LARGE", 1)
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    (tmp_path / "weights.bin").write_bytes(b"one")
    assert identity.hash_of(tmp_path / "weights.bin") == hashlib.sha256(b"one").hexdigest()


def test_weights_and_config_decide_and_nothing_else_does(tmp_path: Path):
    one, other = (save_tiny(tmp_path / name, tiny_llama(1)) for name in ("one", "other"))
    (other / "generation_config.json").write_text("{}", encoding="utf-8")
    assert identity.weights_of(str(one)) == identity.weights_of(str(other))
    assert identity.content_of(str(one)) != identity.content_of(str(other))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}), encoding="utf-8")
    assert identity.weights_of(str(one)) != identity.weights_of(str(other))
    reweighed = save_tiny(tmp_path / "reweighed", tiny_llama(1, seed=1))
    assert identity.weights_of(str(one)) != identity.weights_of(str(reweighed))


def test_vocabulary_is_what_the_ids_stand_for(tmp_path: Path):
    one, other = (save_tiny(tmp_path / name, tiny_llama(1)) for name in ("one", "other"))
    assert identity.vocabulary_of(str(one)) == identity.vocabulary_of(str(other))
    tokens = json.loads((other / "tokenizer.json").read_text())
    words = tokens["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    assert identity.vocabulary_of(str(one)) != identity.vocabulary_of(str(other))
