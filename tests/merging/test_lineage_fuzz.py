"""Any JSON is a history or one InputError, and a sealed history that was damaged is noticed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcprune.errors import InputError
from lcprune.merging.lineage import MergeHistory, MergeStep
from tests.merging.test_lineage import DROP, histories

SEALED = MergeHistory(6, (MergeStep((1, 2), DROP, (0.5, 0.5), {"seen": 0.25}, 3, {"loss": 2.0}),), "teacher")
"""With something in every field."""

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def read(text: str) -> MergeHistory | None:
    """None where it is refused."""
    try:
        return MergeHistory.from_json(text)
    except InputError:
        return None


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A whole history in which one entry, wherever it is, has any other value or a wrong name."""
    content = json.loads(draw(histories()).to_json())
    place = content
    if content["steps"] and draw(st.booleans()):
        place = draw(st.sampled_from(content["steps"]))
    name = draw(st.sampled_from(sorted(place)) | st.text(max_size=4))
    place[name] = draw(values)
    return json.dumps(content)


@given(st.text(max_size=40) | values.map(json.dumps) | damaged())
def test_any_text_is_a_history_or_refused(text: str):
    history = read(text)
    if history is not None:
        assert sum(map(len, history.lineage)) == history.teacher_depth
        assert MergeHistory.from_json(history.to_json()).digest == history.digest


@pytest.mark.slow
@settings(max_examples=20_000)
@given(values.map(json.dumps) | damaged())
def test_any_text_is_a_history_or_refused_at_length(text: str):
    read(text)


@given(histories())
def test_sealed_history_is_read_as_it_was(history: MergeHistory):
    assert MergeHistory.from_json(history.sealed()) == history


@given(st.data())
def test_flipped_bit_of_a_sealed_history_is_noticed(data: st.DataObject):
    content = bytearray(SEALED.sealed().encode())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    assert read(content.decode("utf-8", "replace")) in (None, SEALED)  # equal where the bit was of a space


@given(st.integers(0, len(SEALED.sealed()) - 3))
def test_sealed_history_that_was_cut_off_is_noticed(length: int):
    assert read(SEALED.sealed()[:length]) is None


def test_edited_history_is_refused_unless_its_seal_goes():
    content = json.loads(SEALED.sealed())
    content["steps"][0]["measured"]["loss"] = 1.0
    with pytest.raises(InputError, match=r"sha256 differs.*delete the entry"):
        MergeHistory.from_dict(content)
    del content["sha256"]
    assert MergeHistory.from_dict(content).steps[0].measured == {"loss": 1.0}
