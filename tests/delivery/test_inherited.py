"""A student gets from its teacher's folder what belongs to it and transformers does not save."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lcprune.delivery.export import check_target, export
from lcprune.merging.lineage import MergeHistory
from tests.builders import save_tiny, tiny_llama


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    folder = save_tiny(tmp_path / "teacher")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "notes.txt"):
        (folder / name).write_text(f"terms of {name}")
    return folder


def test_older_file_of_the_tokenizer_comes_along(teacher: Path, tmp_path: Path):
    out = export(tiny_llama(4), tmp_path / "short", tokenizer=teacher, history=MergeHistory(4))
    assert (out / "tokenizer.model").read_bytes() == b"pieces"


def test_older_file_of_a_tokenizer_that_has_grown_stays(teacher: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["<new>"])
    out = export(tiny_llama(4), tmp_path / "short", tokenizer=tokenizer, history=MergeHistory(4))
    assert not (out / "tokenizer.model").exists()


def test_terms_come_along_and_the_export_may_still_be_replaced(teacher: Path, tmp_path: Path):
    out = export(tiny_llama(4), tmp_path / "short", tokenizer=teacher, history=MergeHistory(4))
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        assert (out / name).read_text() == f"terms of {name}"
    assert not (out / "notes.txt").exists()
    check_target(out)


def test_files_of_a_model_on_the_hub_are_taken_from_its_cache(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.name_or_path = "owner/name"
    place = "lcprune.delivery.inherited"
    monkeypatch.setattr(f"{place}.try_to_load_from_cache", lambda name, file: str(teacher / file))
    monkeypatch.setattr(f"{place}.hf_hub_download", lambda name, file: pytest.fail("fetched what is there"))
    out = export(tiny_llama(4), tmp_path / "short", tokenizer=tokenizer, history=MergeHistory(4))
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert (out / "LICENSE").is_file()
