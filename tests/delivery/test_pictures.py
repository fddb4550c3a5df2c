"""The picture of scores: a PNG of a known size, drawn without a warning; one sentence where matplotlib is missing."""

import json
import struct
from dataclasses import replace
from math import inf, nan

import pytest

from lcprune.delivery import pictures
from lcprune.delivery.pictures import DOTS_PER_INCH, Scores, draw_scores
from lcprune.merging.heatmaps import WeightDistances
from tests.marks import slow


def scores(layers: int = 6, **changes: object) -> Scores:
    rising = tuple(float(layer + 1) for layer in range(layers))
    pairs = tuple((1.0, 2.0 + pair) for pair in range(layers - 1))
    made = Scores(
        model="somebody/something",
        dtype="float32",
        tokens=1234,
        criteria={"BlockInfluence": rising, "AngularDistance(span=2)": rising[1:], "TrialPerplexity": rising[::-1]},
        weights=WeightDistances(("self_attn.q_proj.weight", "mlp.up_proj.weight"), pairs, pairs),
        cosines=tuple(tuple(0.5 + 0.5 * (a == b) for a in range(layers + 1)) for b in range(layers + 1)),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", png[16:24])


def test_picture_is_a_whole_png_with_a_row_per_criterion():
    width, height = size(draw_scores(scores()))
    assert width == 15 * DOTS_PER_INCH
    fewer = scores(criteria={"BlockInfluence": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)})
    assert size(draw_scores(fewer))[1] < height


@pytest.mark.parametrize("layers", [2, *slow(3, 80)])
def test_picture_of_any_depth(layers: int):
    size(draw_scores(scores(layers)))


@pytest.mark.parametrize(
    "values",
    [(inf, 2.0, 3.0, 3.0, 4.0, 9e9), (nan, 1.0, 1.0, 1.0, 1.0, 1.0), (0.0,) * 6, (inf,) * 6, (nan,) * 6],
    ids=str,
)
def test_picture_of_scores_that_are_no_numbers_equal_or_far_off(values: tuple[float, ...]):
    size(draw_scores(scores(criteria={"TrialPerplexity": values})))


def test_far_off_scores_do_not_squeeze_the_others():
    assert pictures._ceiling((3e5, 20.0, 18.0, 17.0, 17.5, 19.0)) == 20.0
    assert pictures._ceiling((1.0, 2.0, 3.0, 4.0)) == 4.0


def test_correlation_of_rankings_by_hand():
    assert pictures._correlation([0, 1, 2], [0, 1, 2]) == 1
    assert pictures._correlation([0, 1, 2], [2, 1, 0]) == -1
    assert pictures._correlation([0, 1, 2, 3], [1, 0, 2, 3]) == pytest.approx(0.8)


def test_scores_as_plain_data_are_strict_json():
    found = scores(criteria={"TrialPerplexity": (inf, 1.0, nan, 2.0, 3.0, 4.0)})
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["criteria"]["TrialPerplexity"] == [None, 1.0, None, 2.0, 3.0, 4.0]
    assert content["layers"] == 6
    assert content["weights"]["matrices"] == ["self_attn.q_proj.weight", "mlp.up_proj.weight"]
    assert len(content["cosines"]) == 7


def test_cosines_and_distances_that_are_no_numbers_are_none_in_json():
    pairs = ((1.0, nan), (inf, 2.0))
    found = scores(3, cosines=((1.0, nan), (-inf, 1.0)), weights=WeightDistances(("a", "b"), pairs, pairs))
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["cosines"] == [[1.0, None], [None, 1.0]]
    assert content["weights"]["raw"] == content["weights"]["normalised"] == [[1.0, None], [None, 2.0]]


def test_missing_matplotlib_is_a_sentence_that_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    assert pictures.missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'lcprune[report]'" in str(pictures.missing())
