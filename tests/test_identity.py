"""What tells one model from another."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lcprune import files, identity
from lcprune.errors import InputError
from tests.builders import save_tiny, tiny_llama


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCPRUNE_CACHE", str(tmp_path / "cache"))


def test_hash_of_a_large_file_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "LARGE", 1)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    first, time = files.hash_of(path), path.stat().st_mtime_ns
    path.write_bytes(b"two")
    os.utime(path, ns=(time, time))
    assert files.hash_of(path) == first
    os.utime(path, ns=(time, time + 1))
    assert files.hash_of(path) == hashlib.sha256(b"two").hexdigest() != first


def test_hash_that_cannot_be_remembered_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "LARGE", 1)
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    (tmp_path / "weights.bin").write_bytes(b"one")
    assert files.hash_of(tmp_path / "weights.bin") == hashlib.sha256(b"one").hexdigest()


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


@pytest.mark.parametrize("name", ["evaluation.json", "figures.json", "history.json", "scores.json"])
def test_what_is_written_about_a_model_does_not_make_it_another(name: str, tmp_path: Path):
    model = save_tiny(tmp_path, tiny_llama(1))
    before = identity.content_of(str(model))
    (model / name).write_text("{}", encoding="utf-8")
    assert identity.content_of(str(model)) == before


def test_vocabulary_is_what_the_ids_stand_for(tmp_path: Path):
    one, other = (save_tiny(tmp_path / name, tiny_llama(1)) for name in ("one", "other"))
    assert identity.vocabulary_of(str(one)) == identity.vocabulary_of(str(other))
    tokens = json.loads((other / "tokenizer.json").read_text())
    words = tokens["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    assert identity.vocabulary_of(str(one)) != identity.vocabulary_of(str(other))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = save_tiny(tmp_path / "model")
    identity.write_checksums(folder)
    (folder / "history.json").write_text("{}")
    return folder


def test_checksums_are_those_that_sha256sum_reads(exported: Path):
    digest = hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()
    assert (exported / "SHA256SUMS").read_text() == f"{digest}  model.safetensors\n"


def test_weights_as_exported_and_weights_of_others_pass(exported: Path, tmp_path: Path):
    identity.check_exported(exported)
    identity.check_exported(save_tiny(tmp_path / "other"))
    (exported / "config.json").write_text((exported / "config.json").read_text() + "\n")
    identity.check_exported(exported)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "model.safetensors is not as it was exported"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "model.safetensors is not as it was exported"),
        (Path.unlink, "model.safetensors is missing"),
        (lambda file: file.with_name("SHA256SUMS").write_bytes(b"\xff\xfe"), "is not as it was exported"),
        (lambda file: file.with_name("SHA256SUMS").write_bytes(b""), "is not as it was exported"),
    ],
)
def test_damaged_weights_are_refused_in_one_sentence(damage: Callable[[Path], None], message: str, exported: Path):
    damage(exported / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        identity.check_exported(exported)
    assert "delete" in str(caught.value)
    assert str(exported) in str(caught.value)


def test_list_of_others_is_read_as_far_as_it_is_about_weights(tmp_path: Path):
    folder = save_tiny(tmp_path / "model")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    others = "# made elsewhere\nSHA256 (config.json) = 00\n{0}  README.md\n{0}  consolidated.safetensors\n"
    others = others.format("0" * 64)
    (folder / "SHA256SUMS").write_text(f"{others}{digest} *model.safetensors\n")
    identity.check_exported(folder)
    (folder / "SHA256SUMS").write_text(f"{others}{'0' * 64} *model.safetensors\n")
    with pytest.raises(InputError, match="is not as it was exported"):
        identity.check_exported(folder)
