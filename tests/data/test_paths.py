"""Several files are one text, whatever names them, and compressed ones are what is in them."""

import gzip
import json
from pathlib import Path

import pytest

from lcprune.data.loader import ResumableLoader
from lcprune.data.module import TextDataModule
from lcprune.data.paths import Given
from lcprune.errors import InputError

WORDS = [f"document number {number}" for number in range(6)]


def texts_in(given: Given, **settings: object) -> list[str]:
    module = TextDataModule(path=given, **settings)  # type: ignore[arg-type]
    return list(module.origin.sources("nobody")[0].documents.texts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of two rows each, and what is no text."""
    for number, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl")):
        rows = (json.dumps({"text": text}) for text in WORDS[2 * number : 2 * number + 2])
        (tmp_path / name).write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "README.md").write_text("no text")
    (tmp_path / ".hidden.jsonl").write_text('{"text": "no text"}')
    return tmp_path


@pytest.mark.parametrize("given", ["", "*.jsonl", "**/*.jsonl"])
def test_folder_and_pattern_are_their_files_in_the_order_of_their_names(folder: Path, given: str):
    assert texts_in(folder / given) == texts_in(str(folder / given)) == WORDS


def test_list_is_read_in_its_own_order(folder: Path):
    assert texts_in([folder / "c.jsonl", str(folder / "a.jsonl")]) == [*WORDS[4:], *WORDS[:2]]


def test_stream_goes_through_all_files(folder: Path):
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "the end"}'))
    module = TextDataModule(path=folder, streaming=True, streaming_window=4)
    windows = [list(documents.texts) for _, documents in module.origin.windows().behind(0)]
    assert windows == [WORDS[:4], [*WORDS[4:], "the end"]]


def test_every_txt_file_is_a_document(tmp_path: Path):
    for name, text in (("b.txt", "second\n\n"), ("a.txt", "first"), ("c.txt", " \n")):
        (tmp_path / name).write_text(text)
    assert texts_in(tmp_path) == ["first", "second\n\n"]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_compressed_file_is_what_is_in_it(kind: str, tmp_path: Path):
    content = {".jsonl": '{"text": "ä b"}\n', ".json": '[{"text": "ä b"}]', ".csv": "text\nä b\n", ".txt": "ä\n\nb\n"}
    plain, packed = tmp_path / f"plain{kind}", tmp_path / f"packed{kind}.gz"
    plain.write_text(content[kind], encoding="utf-8")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert texts_in(packed) == texts_in(plain)


def test_run_does_not_go_on_in_files_of_which_one_has_changed(folder: Path, tiny_folder: Path):
    def batches() -> ResumableLoader:
        module = TextDataModule(tokenizer=tiny_folder, path=folder, block_size=8, batch_size=1, validation_fraction=0.1)
        module.setup()
        loader = module.train_dataloader()
        assert isinstance(loader, ResumableLoader)
        return loader

    begun = batches()
    next(iter(begun))
    before = begun.state_dict()
    batches().load_state_dict(before)
    (folder / "b.jsonl").write_text('{"text": "document"}\n{"text": "another text"}')
    with pytest.raises(InputError, match="resume with the same"):
        batches().load_state_dict(before)


def test_file_whose_name_looks_like_a_pattern_is_that_file(folder: Path):
    (folder / "[a].jsonl").write_text('{"text": "itself"}')
    assert texts_in(folder / "[a].jsonl") == ["itself"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("empty", "data.path=.*empty names no file that ends in .jsonl"),
        ("*.csv", r"data.path=.*\*.csv names no file that ends in .jsonl"),
        ([], r"data.path=\[\] names no file"),
        (["a.jsonl", "t.txt"], r"data.path=.* are files of several kinds \(.jsonl, .txt\): name those of one"),
        (["a.jsonl", "z.jsonl", "t.xyz"], "z.jsonl does not exist.*; data.path=.*t.xyz ends in '.xyz'"),
        ("cut.jsonl.gz", "data.path=.*cut.jsonl.gz could not be read"),
        ("cut.txt.gz", "data.path=.*cut.txt.gz could not be read"),
        (["a.jsonl", "other.jsonl"], "could not be read .*and that all files have the same columns"),
        (["a.jsonl", 3], "data.path=3 must be text or a path"),
    ],
)
def test_files_that_are_no_text_are_refused_in_one_sentence(folder: Path, given: object, words: str):
    (folder / "empty").mkdir()
    (folder / "t.txt").write_text("text")
    (folder / "other.jsonl").write_text('{"body": ["text"]}')
    (folder / "t.xyz").write_text("text")
    for kind in ("jsonl", "txt"):
        (folder / f"cut.{kind}.gz").write_bytes(gzip.compress(b'{"text": "words of a file"}' * 99)[:40])
    places = [folder / each if isinstance(each, str) else each for each in given] if isinstance(given, list) else None
    with pytest.raises(InputError, match=words) as caught:
        texts_in(folder / str(given) if places is None else places)  # type: ignore[arg-type]
    assert ". " not in str(caught.value)
