"""safetensors folders without memory maps: the library reads what we write, and we read what it writes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcprune.errors import InputError, RunError
from lcprune.merging.shards import Shards, ShardWriter
from lcprune.weights import INDEX, ONE_FILE, header_of

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"x{i}": torch.randn(3, 5, generator=generator).mul(3).to(dtype) for i, dtype in enumerate(DTYPES)}
    return {**made, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.ones(3, dtype=torch.bfloat16)}


def written(folder: Path, content: dict[str, Tensor], shard_bytes: int = 10**9) -> ShardWriter:
    writer = ShardWriter(folder, {name: tensor.to("meta") for name, tensor in content.items()}, shard_bytes)
    for name in reversed(content):
        writer.write(name, [content[name]])
    return writer


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_every_dtype_is_read_as_the_library_wrote_it(tmp_path: Path):
    save_file(tensors(), tmp_path / ONE_FILE)
    shards = Shards(tmp_path)
    assert_same({name: shards.read(name) for name in shards.entries}, tensors())


def test_every_dtype_is_written_as_the_library_reads_it(tmp_path: Path):
    written(tmp_path, tensors()).verify()
    assert_same(load_file(tmp_path / ONE_FILE), tensors())
    assert not (tmp_path / INDEX).exists()


def test_every_tensor_begins_at_a_multiple_of_its_width(tmp_path: Path):
    content = {"narrow": torch.zeros(3, dtype=torch.uint8), "wide": torch.zeros(2)}
    written(tmp_path, content)
    start, header = header_of(tmp_path / ONE_FILE)
    assert {name: (start + header[name]["data_offsets"][0]) % content[name].itemsize for name in content} == {
        "narrow": 0,
        "wide": 0,
    }


@pytest.mark.parametrize("indices", [[0], [4], [1, 2, 3], [0, 2, 3, 6], [], [5, 1]])
def test_rows_are_those_of_the_whole_tensor(tmp_path: Path, indices: list[int]):
    table = torch.randn(7, 3)
    save_file({"other": torch.ones(2), "table": table}, tmp_path / ONE_FILE)
    torch.testing.assert_close(Shards(tmp_path).rows("table", indices), table[indices], rtol=0, atol=0)


@pytest.mark.parametrize("elements", [1, 4, 21, 100])
def test_pieces_put_together_are_the_tensor(tmp_path: Path, elements: int):
    table = torch.randn(7, 3)
    save_file({"table": table}, tmp_path / ONE_FILE)
    pieces = list(Shards(tmp_path).pieces("table", elements))
    assert max(map(len, pieces)) <= elements
    torch.testing.assert_close(torch.cat(pieces).view(7, 3), table, rtol=0, atol=0)


def test_shards_are_bounded_and_the_index_names_every_tensor_once(tmp_path: Path):
    content = {f"layer.{index}": torch.randn(10) for index in range(7)} | {"large": torch.randn(100)}
    written(tmp_path, content, shard_bytes=100).verify()
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert [file.name for file in files] == [f"model-{n:05}-of-00005.safetensors" for n in range(1, 6)]
    assert [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files] == [80, 80, 80, 40, 400]
    index = json.loads((tmp_path / INDEX).read_text())
    assert {name: load_file(tmp_path / file)[name].shape for name, file in index["weight_map"].items()} == {
        name: tensor.shape for name, tensor in content.items()
    }
    assert index["metadata"] == {"total_parameters": 170, "total_size": 680}
    assert_same({name: Shards(tmp_path).read(name) for name in content}, content)


def test_pieces_are_cast_to_the_expected_dtype(tmp_path: Path):
    content = torch.randn(10, 3)
    writer = ShardWriter(tmp_path, {"x": content.to(torch.bfloat16)})
    writer.write("x", content.split(4))
    writer.verify()
    torch.testing.assert_close(load_file(tmp_path / ONE_FILE)["x"], content.to(torch.bfloat16), rtol=0, atol=0)


def test_tensors_that_are_not_contiguous_are_written_in_their_order(tmp_path: Path):
    written(tmp_path, {"x": torch.arange(6).view(2, 3).t()}).verify()
    assert load_file(tmp_path / ONE_FILE)["x"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_tensor_is_written_once_and_whole(tmp_path: Path):
    writer = ShardWriter(tmp_path, {"x": torch.zeros(4), "y": torch.zeros(4)})
    writer.write("x", [torch.zeros(4)])
    with pytest.raises(AssertionError, match="twice"):
        writer.write("x", [torch.zeros(4)])
    with pytest.raises(AssertionError, match="12 bytes, 16 are expected"):
        writer.write("y", [torch.zeros(3)])
    with pytest.raises(AssertionError, match="never written"):
        writer.verify()


def test_verify_finds_a_byte_that_changed_on_the_disk(tmp_path: Path):
    writer = written(tmp_path, {"x": torch.zeros(4), "y": torch.zeros(4)})
    with (tmp_path / ONE_FILE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(RunError, match="1 of 2 tensors, first y"):
        writer.verify()


def test_disk_without_room_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"No space left on device, 0\.0 GB are needed"):
        ShardWriter(tmp_path, {"x": torch.zeros(4)})
    assert not list(tmp_path.iterdir())


def cut(folder: Path) -> None:
    data = (folder / ONE_FILE).read_bytes()
    (folder / ONE_FILE).write_bytes(data[:-1])


def pickled(folder: Path) -> None:
    (folder / ONE_FILE).rename(folder / "pytorch_model.bin")


def index(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / ONE_FILE).unlink()
        (folder / INDEX).write_text(text)

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "no whole safetensors file"),
        (lambda folder: (folder / ONE_FILE).write_bytes(b"\x05\0\0\0\0\0\0\0abcde"), "not a safetensors file"),
        (lambda folder: (folder / ONE_FILE).write_bytes(b"\xff" * 100), "no whole safetensors file"),
        (lambda folder: (folder / ONE_FILE).write_bytes(b""), "not a safetensors file"),
        (lambda folder: (folder / ONE_FILE).unlink(), "neither model.safetensors nor"),
        (pickled, "pickled weights"),
        (index("{"), "not an index"),
        (index('{"weight_map": {"x": "model-1.safetensors"}}'), "1 files that are not there, first model-1"),
    ],
)
def test_folders_that_cannot_be_read_are_refused_in_a_sentence(
    tmp_path: Path, damage: Callable[[Path], None], message: str
):
    save_file({"x": torch.zeros(4)}, tmp_path / ONE_FILE)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        Shards(tmp_path)


def test_packed_dtype_is_refused_by_name(tmp_path: Path):
    save_file({"x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / ONE_FILE)
    with pytest.raises(InputError, match="F8_E4M3"):
        Shards(tmp_path).read("x")
