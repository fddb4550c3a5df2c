"""Schedules, and a teacher cache on a disk that lies: any numbers and any damage end in a value or one InputError."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcprune.distillation.cache import MANIFEST, Manifest, TeacherCache
from lcprune.distillation.schedules import AtSteps, Evenly, EveryNSteps, Schedule
from lcprune.errors import InputError
from tests.distillation import caches

whole = st.integers(-3, 40) | st.integers() | st.just(10**400)


def made(kind: type[Schedule], *numbers: object) -> Schedule | None:
    try:
        return kind(*numbers)  # type: ignore[call-arg]
    except InputError:
        return None


schedules = st.one_of(
    st.dictionaries(whole, whole, max_size=4).map(lambda depths: made(AtSteps, depths)),
    st.tuples(whole, whole, whole, whole).map(lambda numbers: made(EveryNSteps, *numbers)),
    st.tuples(whole, whole, whole, st.none() | whole).map(lambda numbers: made(Evenly, *numbers)),
)


@settings(max_examples=300)
@given(schedules, st.integers(2, 40), st.just(-1) | st.integers(0, 10**6))
def test_schedule_that_passes_its_check_goes_down_step_by_step(schedule: Schedule | None, depth: int, steps: int):
    if schedule is None:
        return
    try:
        schedule.check(depth, steps)
    except InputError:
        return
    milestones = schedule.milestones(depth)
    assert all(before[0] < after[0] and before[1] > after[1] for before, after in pairwise(milestones))
    assert 1 <= milestones[-1][1] <= milestones[0][1] < depth
    assert milestones[0][0] >= 0
    assert schedule.target(depth) == milestones[-1][1]


@pytest.fixture(scope="module")
def cache(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return caches.fill(tmp_path_factory.mktemp("cache") / "made", tiny_folder, caches.blocks(), layers=(2,))


def spoilt(folder: Path, copy: Path, file: str, data: st.DataObject) -> Path:
    """The same folder with one bit of a file flipped, or its end cut off."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    content = bytearray((copy / file).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    (copy / file).write_bytes(bytes(content))
    return copy


FIXTURES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


@FIXTURES
@given(st.data())
def test_damaged_manifest_of_a_cache_is_noticed(cache: Path, tmp_path: Path, data: st.DataObject):
    manifest = Manifest.read(cache)
    folder = spoilt(cache, tmp_path / "copy", MANIFEST, data)
    try:
        read = Manifest.read(folder)
    except InputError:
        return
    assert read == manifest  # the bit was of a space


@FIXTURES
@given(st.data())
def test_damaged_shard_of_a_cache_is_noticed(cache: Path, tmp_path: Path, data: st.DataObject):
    file = data.draw(st.sampled_from(sorted(path.name for path in cache.glob("*.safetensors"))))
    with pytest.raises(InputError, match=f"{file} is missing or not as it was written"):
        TeacherCache(spoilt(cache, tmp_path / "copy", file, data))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"shard-00000.safetensors"', '"../shard-00000.safetensors"'),
        ('"shard-00000.safetensors"', '"/etc/passwd"'),
        ('"blocks": 9', '"blocks": "9"'),
        ('"blocks": 9', '"blocks": -9'),
        ('"blocks": 9', '"blocks": true'),
        ('"top_k": 5', '"top_k": null'),
        ('"layers": [', '"layers": ["2", '),
        ('"format": 1', '"format": 2'),
    ],
)
def test_manifest_that_no_cache_was_written_with_is_refused_without_a_seal_too(
    cache: Path, tmp_path: Path, old: str, new: str
):
    content = json.loads((cache / MANIFEST).read_text())
    del content["sha256"]
    text = json.dumps(content)
    assert Manifest.read(_written(tmp_path, text)) == Manifest.read(cache)
    assert old in text
    with pytest.raises(InputError, match=MANIFEST):
        Manifest.read(_written(tmp_path, text.replace(old, new)))


def _written(folder: Path, text: str) -> Path:
    (folder / MANIFEST).write_text(text)
    return folder
