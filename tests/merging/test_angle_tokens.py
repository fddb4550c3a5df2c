"""The angle over layers, looked at by all tokens or by the last of every sequence."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from lcprune.errors import InputError
from lcprune.merging.calibration import Calibration
from lcprune.merging.criteria import AngularDistance
from lcprune.merging.streaming import StoredModel, StreamedCalibration
from tests.builders import tiny_llama
from tests.merging.activities import masked
from tests.merging.planning import plain

LAST = AngularDistance(span=2, tokens="last")


def test_angle_of_the_last_tokens_is_that_of_the_last_unmasked_token_of_every_sequence():
    model, batches = tiny_llama(), masked()
    calibration = Calibration(model, batches)
    turns = []
    for batch in batches:
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        for row, mask in enumerate(batch["attention_mask"].tolist()):
            last = max(place for place, one in enumerate(mask) if one)
            cosine = cosine_similarity(states[2][row, last], states[4][row, last], dim=-1)
            turns.append(cosine.double().arccos().item() / torch.pi)
    scores = LAST.score(calibration)
    assert len(scores) == 5
    assert scores[2] == pytest.approx(sum(turns) / len(turns), abs=1e-6)
    assert AngularDistance(span=2).score(calibration)[2] != pytest.approx(scores[2], abs=1e-4)


def test_angle_of_the_last_tokens_leaves_the_statistics_of_all_tokens_alone():
    calibration = Calibration(tiny_llama(), plain())
    before = AngularDistance().score(calibration)
    LAST.score(calibration)
    assert calibration.stats(1).tokens == 96
    assert AngularDistance().score(calibration) == before


def test_angle_of_the_last_tokens_is_the_same_for_a_model_that_stays_on_disk(tiny_folder: Path):
    model = tiny_llama()
    stored = StoredModel(model.config, tiny_folder, dtype=torch.float32)
    streamed = StreamedCalibration(stored.model, masked(), stored=stored)
    assert LAST.score(streamed) == pytest.approx(LAST.score(Calibration(model, masked())), abs=1e-6)


def test_names_of_criteria_say_what_is_not_the_default():
    assert repr(AngularDistance(span=2)) == "AngularDistance(span=2)"
    assert repr(LAST) == "AngularDistance(span=2, tokens='last')"


def test_angle_refuses_tokens_that_it_does_not_know():
    with pytest.raises(InputError, match="tokens='first' of AngularDistance must be all or last"):
        AngularDistance(tokens="first")  # type: ignore[arg-type]
