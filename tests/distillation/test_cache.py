"""A teacher cache on the disk: what is in it, how it is found, how a killed one goes on, and what is refused."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lcprune.distillation.cache import (
    MANIFEST,
    Manifest,
    Origin,
    Shard,
    TeacherCache,
    batch_of,
    check_levels,
    keys_of,
    rows_of,
)
from lcprune.distillation.fill import block_bytes, different
from lcprune.distillation.levels import Boundary, Labels, Level, Logits
from lcprune.distillation.passes import Wanted
from lcprune.distillation.teacher import Teacher
from lcprune.errors import InputError
from tests import builders
from tests.distillation import caches


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of nine blocks with the states of two layers; read only."""
    return caches.fill(tmp_path_factory.mktemp("cache") / "made", tiny_folder, caches.blocks(), layers=(2, 5))


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "copied"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def told(caught: pytest.ExceptionInfo[InputError]) -> str:
    """The message, which has to be one sentence."""
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message
    return message


def test_cache_says_what_the_teacher_says(made: Path):
    rows = caches.blocks()[3:5].long()
    found = TeacherCache(made).look_up(rows, (2, 5))
    model = builders.tiny_llama()
    with torch.no_grad():
        output = model(rows, output_hidden_states=True)
        outer = Teacher(model)({"input_ids": rows}, Wanted(outputs=(2, 5)))
    log_p, ids = output.logits.log_softmax(-1).topk(5)
    assert found.buckets.ids.equal(ids.int())
    torch.testing.assert_close(found.buckets.log_p, log_p)
    torch.testing.assert_close(found.buckets.log_tail.exp(), 1 - log_p.exp().sum(-1))
    assert {layer: state.dtype for layer, state in found.states.items()} == {2: torch.bfloat16, 5: torch.bfloat16}
    for layer, state in found.states.items():
        torch.testing.assert_close(state, outer.layers[layer].bfloat16())


def test_block_is_found_by_its_tokens_whatever_the_order_and_batch(made: Path):
    cache, rows = TeacherCache(made), caches.blocks()
    whole = cache.look_up(rows).buckets
    order = torch.tensor([7, 0, 9, 2])
    some = cache.look_up(rows[order].long()).buckets
    assert some.ids.equal(whole.ids[order])
    assert some.log_p.equal(whole.log_p[order])
    assert whole.log_tail[0].equal(whole.log_tail[9])  # the same block


def test_block_that_repeats_is_stored_once(made: Path):
    manifest = Manifest.read(made)
    assert [shard.blocks for shard in manifest.shards] == [2, 2, 2, 2, 1]
    assert manifest.origin.blocks == len(different(caches.blocks())) == caches.FEW


def test_disk_is_estimated_to_a_few_headers(made: Path):
    manifest = Manifest.read(made)
    said = block_bytes(manifest.origin, caches.HIDDEN) * caches.FEW
    taken = sum(path.stat().st_size for path in made.glob("*.safetensors"))
    assert said <= taken <= said + 1000 * len(manifest.shards)


def test_keys_tell_apart_what_differs_in_one_token_or_its_place():
    one = torch.tensor([[1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2, 3]])
    keys = keys_of(one)
    assert len(set(keys)) == 3
    assert keys[0] == keys[3] == keys_of(one.int())[0]
    assert keys_of(torch.tensor([[258]])) != keys_of(torch.tensor([[2, 1]]))


@pytest.mark.parametrize("names", [("input_ids",), ("input_ids", "position_ids")])
def test_rows_of_a_batch_make_the_same_batch_again(names: tuple[str, ...]):
    whole = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    batch = {name: whole[name] for name in names}
    torch.testing.assert_close(batch_of(rows_of(batch)), batch)


def test_tail_is_the_mean_over_blocks_and_not_over_shards():
    origin = Origin("t", "v", "float32", blocks=5, block_size=4, keys="k", batch_size=1, top_k=1, layers=())
    manifest = Manifest(origin, (Shard("a", 4, "s", 0.1), Shard("b", 1, "s", 0.6)))
    assert manifest.tail == pytest.approx(0.2)


class Killed(Exception):
    pass


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_killed_cache_goes_on_and_ends_with_the_same_bytes(made: Path, tiny_folder: Path, tmp_path: Path, batches: int):
    rows = caches.blocks()
    teacher = Teacher(builders.tiny_llama())
    count = 0

    class Dying(Teacher):
        def __call__(self, *arguments: object) -> object:  # type: ignore[override]
            nonlocal count
            if count == batches:
                raise Killed
            count += 1
            return teacher(*arguments)  # type: ignore[arg-type]

    job = caches.filling(tmp_path / "cache", tiny_folder, rows, layers=(2, 5))
    with pytest.raises(Killed):
        job.run(Dying(teacher.model), different(rows))
    (tmp_path / "cache" / ".shard-00009.safetensors.tmp-4711").write_bytes(b"half a shard")
    again = caches.filling(tmp_path / "cache", tiny_folder, rows, layers=(2, 5))
    assert again.blocks_left == caches.FEW - 2 * batches
    if batches:
        with pytest.raises(InputError, match=f"has {2 * batches} of 9 blocks"):
            TeacherCache(tmp_path / "cache")
    again.run(teacher, different(rows))
    assert files_of(tmp_path / "cache") == files_of(made)


def test_filling_goes_on_that_was_killed_while_it_wrote_its_first_manifest(tmp_path: Path, tiny_folder: Path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / ".manifest.json.tmp-4711").write_text("{")
    job = caches.filling(folder, tiny_folder, torch.arange(64).reshape(4, 16))
    assert job.blocks_left > 0


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("spoil", [flip, cut, Path.unlink])
def test_damaged_shard_is_noticed_when_opened_and_made_anew(
    made: Path, copied: Path, tiny_folder: Path, spoil: Callable[[Path], None]
):
    spoil(copied / "shard-00001.safetensors")
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is missing or not as it was written") as caught:
        TeacherCache(copied)
    told(caught)
    again = caches.filling(copied, tiny_folder, caches.blocks(), layers=(2, 5))
    assert again.blocks_left == 2
    again.run(Teacher(builders.tiny_llama()), different(caches.blocks()))
    assert files_of(copied) == files_of(made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 6}, "top_k 5 and not 6"),
        ({"layers": (2,)}, r"layers \(2, 5\) and not \(2,\)"),
        ({"dtype": "bfloat16"}, "dtype float32 and not bfloat16"),
    ],
)
def test_folder_of_another_cache_is_refused(made: Path, tiny_folder: Path, change: dict[str, object], words: str):
    settings: dict[str, object] = {"layers": (2, 5)} | change
    with pytest.raises(InputError, match=words) as caught:
        caches.filling(made, tiny_folder, caches.blocks(), **settings)
    told(caught)


def test_folder_of_another_text_is_refused(made: Path, tiny_folder: Path):
    with pytest.raises(InputError, match="another keys"):
        caches.filling(made, tiny_folder, caches.blocks() + 1, layers=(2, 5))


def test_folder_with_other_files_is_refused(tiny_folder: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds other files \(thesis\.tex\)") as caught:
        caches.filling(tmp_path, tiny_folder, caches.blocks())
    told(caught)


def test_disk_that_is_too_small_is_noticed_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="GB are needed") as caught:
        caches.filling(tmp_path / "cache", tiny_folder, caches.blocks())
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def cache(made: Path) -> TeacherCache:
    return TeacherCache(made)


def test_cache_of_this_teacher_and_text_is_accepted(cache: TeacherCache, tiny_folder: Path):
    cache.check_teacher(str(tiny_folder))
    cache.check_blocks(caches.blocks())
    cache.check_states({2})


def test_cache_of_another_teacher_is_refused(cache: TeacherCache, tmp_path: Path):
    other = builders.save_tiny(tmp_path / "other", builders.tiny_llama(seed=1))
    with pytest.raises(InputError, match=r"made by another teacher than model\.teacher=") as caught:
        cache.check_teacher(str(other))
    told(caught)


def test_cache_of_another_tokenizer_is_refused(cache: TeacherCache, tmp_path: Path):
    other = builders.save_tiny(tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    words = tokens["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    with pytest.raises(InputError, match="made with another tokenizer") as caught:
        cache.check_teacher(str(other))
    told(caught)


def test_cache_of_other_blocks_is_refused(cache: TeacherCache):
    rows = caches.blocks()
    rows[4, 7] += 1
    with pytest.raises(InputError, match=r"lacks 1 of the recipe's 10 training blocks of 16 tokens") as caught:
        cache.check_blocks(rows)
    told(caught)
    with pytest.raises(InputError, match=r"training blocks of 8 tokens \(it has 9 of 16\)"):
        cache.check_blocks(rows[:, :8])
    with pytest.raises(InputError, match="lacks a block of this batch"):
        cache.look_up(rows)


def test_cache_without_the_states_of_a_layer_is_refused(cache: TeacherCache):
    with pytest.raises(InputError, match=r"layers 3, 4, .*\(it has 2, 5\).*--layers 2,3,4,5 ") as caught:
        cache.check_states({3, 4, 5})
    told(caught)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([Logits(divergence="reverse_kl")], "divergence=reverse_kl"),
        ([Logits(divergence="jsd"), Boundary()], "divergence=jsd"),
        ([Logits(temperature=2.0)], r"temperature=2\.0"),
        ([Labels()], r"objective=\[Labels\] learns nothing from the teacher"),
    ],
)
def test_levels_that_a_cache_cannot_serve_are_refused(levels: list[Level], words: str):
    with pytest.raises(InputError, match=words) as caught:
        check_levels([levels])
    told(caught)
    check_levels([[Logits(), Labels()], [Labels()]])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no json", "is not the manifest"),
        ("[]", "is not the manifest"),
        ('{"format": 1}', "is not the manifest"),
        ('{"format": 99}', "has format 99, this version reads 1"),
    ],
)
def test_manifest_that_is_none_is_refused(copied: Path, content: str, words: str):
    (copied / MANIFEST).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        TeacherCache(copied)
    told(caught)


def test_manifest_that_was_altered_is_refused(copied: Path):
    text = (copied / MANIFEST).read_text(encoding="utf-8")
    (copied / MANIFEST).write_text(text.replace('"dtype": "float32"', '"dtype": "float16"'), encoding="utf-8")
    with pytest.raises(InputError, match=r"is not the manifest of a teacher cache .*sha256 differs") as caught:
        TeacherCache(copied)
    told(caught)


def test_folder_without_a_cache_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="lcprune cache --config RECIPE --out") as caught:
        TeacherCache(tmp_path / "nothing")
    told(caught)


def test_opened_cache_is_mapped_and_not_copied(made: Path):
    cache = TeacherCache(made)
    file = made / "shard-00000.safetensors"
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(file) in mapped.read_text()
    before: Tensor = cache.look_up(caches.blocks()[:1]).buckets.log_p
    assert before.shape == (1, 16, 5)
