"""Arguments of another kind than they should be end in one sentence, and the model is as it was."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BatchEncoding

import lcprune
from lcprune import BlockInfluence, Drop, Evenly, InputError, MergeHistory, OneShotRanking, ProgressiveCollapse
from lcprune.merging.checks import checked_batches
from tests.builders import tiny_config, tiny_llama
from tests.merging.planning import plain

IDS = torch.arange(8).view(2, 4)


def on_meta() -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config())


@pytest.mark.parametrize("call", [lcprune.plan, lcprune.collapse])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"operator": Drop}, r"operator=the class Drop must be an instance of Operator, such as lcprune.Drop\(\)"),
        ({"operator": "Drop"}, "operator='Drop' must be an instance of Operator"),
        ({"planner": BlockInfluence()}, r"planner=BlockInfluence\(\) must be an instance of Planner"),
        ({"planner": OneShotRanking}, "planner=the class OneShotRanking must be"),
        ({"refit": "RidgeRefit"}, "refit='RidgeRefit' must be an instance of Refit"),
        ({"history": "short"}, "history='short' must be an instance of MergeHistory"),
        ({"target_depth": 4.0}, "target_depth=4.0 must be a whole number of layers"),
        ({"target_depth": "4"}, "target_depth='4' must be a whole number of layers"),
        ({"target_depth": True}, "target_depth=True must be a whole number of layers"),
        ({"target_depth": None, "max_perplexity_ratio": "1.3"}, "max_perplexity_ratio=1.3 must be a number above 1"),
    ],
)
def test_argument_of_another_kind_is_refused(call: Callable[..., MergeHistory], settings: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        call(tiny_llama(), plain(), **{"target_depth": 4} | settings)


def test_numpys_whole_numbers_are_depths():
    plans = [lcprune.plan(tiny_llama(), plain(), target_depth=depth) for depth in (4, np.int64(4))]
    assert plans[0].to_json() == plans[1].to_json()


CALLS: list[Callable[[Any, Any], object]] = [
    lambda model, batches: lcprune.plan(model, batches, target_depth=4),
    lambda model, batches: lcprune.collapse(model, batches, target_depth=4),
    lambda model, batches: lcprune.execute(model, MergeHistory(6), batches),
    lcprune.score,
    lcprune.perplexity,
]


@pytest.mark.parametrize("call", CALLS, ids=["plan", "collapse", "execute", "score", "perplexity"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: "my-model", "model='my-model' must be a transformers model in memory: load one with"),
        (lambda: tiny_llama().model, "model is a LlamaModel without a head"),
        (on_meta, "model has weights on the meta device"),
    ],
    ids=["name", "headless", "meta"],
)
def test_model_of_another_kind_is_refused(
    call: Callable[[object, object], object], make: Callable[[], object], words: str
):
    with pytest.raises(InputError, match=words):
        call(make(), plain())


@pytest.mark.parametrize("call", CALLS, ids=["plan", "collapse", "execute", "score", "perplexity"])
@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ("my.jsonl", "batches='my.jsonl' must be a list of batches"),
        (3, "batches=3 must be a list of batches"),
        ({"input_ids": IDS}, "batches=.* must be a list of batches"),
        (IDS, "batches=.* must be a list of batches"),
        (["a text"], r"batches\[0\] is a str, and must hold input_ids, whole numbers \[B, T\]: lcprune.TextDataModule"),
        ([{"input_ids": IDS}, IDS], r"batches\[1\] is a Tensor, and"),
        ([{"text": "a", "id": 1}], r"batches\[0\] holds text, id, and"),
        ([{"input_ids": IDS.tolist()}], r"batches\[0\] has input_ids in a list, and"),
        ([{"input_ids": IDS[0]}], r"batches\[0\] has input_ids of the shape \[4\], and"),
        ([{"input_ids": IDS.float()}], r"batches\[0\] has input_ids in float32, and"),
        (DataLoader(["a", "b"]), r"batches\[0\] is a list, and"),  # type: ignore[arg-type]
    ],
    ids=["path", "number", "batch", "tensor", "texts", "tensors", "columns", "lists", "rows", "floats", "loader"],
)
def test_batches_of_another_kind_are_refused(call: Callable[[object, object], object], batches: object, words: str):
    with pytest.raises(InputError, match=f"(?s){words}"):
        call(tiny_llama(), batches)


def test_data_module_is_refused_with_the_way_to_its_batches():
    with pytest.raises(InputError, match=r"batches=.*TextDataModule.* must be a list .*calibration_batches\(\) makes"):
        lcprune.plan(tiny_llama(), lcprune.TextDataModule(), target_depth=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        [{"input_ids": IDS}],
        ({"input_ids": IDS.int()},),
        DataLoader([{"input_ids": row} for row in IDS], batch_size=2),  # type: ignore[arg-type]
        (BatchEncoding({"input_ids": IDS}) for _ in range(1)),
    ],
    ids=["list", "int32", "loader", "generator"],
)
def test_every_kind_of_batches_is_taken(given: Iterable[Any]):
    (batch,) = checked_batches(given)
    assert batch["input_ids"].tolist() == IDS.tolist()


def test_compiled_model_is_a_model():
    compiled = torch.compile(tiny_llama(), backend="eager")
    expected = lcprune.plan(tiny_llama(), plain(), target_depth=4)
    assert lcprune.plan(compiled, plain(), target_depth=4).lineage == expected.lineage  # type: ignore[arg-type]


@pytest.mark.parametrize("criterion", [BlockInfluence, "BlockInfluence", OneShotRanking()])
def test_criterion_of_another_kind_is_refused(criterion: object):
    for call in (
        lambda: OneShotRanking(criterion),  # type: ignore[arg-type]
        lambda: lcprune.GreedyPlanner(criterion=criterion),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=r"criterion=.* must be an instance of Criterion"):
            call()
    for criteria in (criterion, [criterion]):
        with pytest.raises(InputError, match=r"criteria=.* must be an instance of Criterion"):
            lcprune.score(tiny_llama(), plain(), criteria=criteria)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ((Evenly,), {}, r"schedule=the class Evenly must be an instance of Schedule, such as lcprune.Evenly\(20\)"),
        ((4,), {}, "schedule=4 must be"),
        ((), {"planner": BlockInfluence()}, "planner=.* must be an instance of Planner"),
        ((), {"operator": "Drop"}, "operator='Drop' must be"),
        ((), {"refit": lcprune.RidgeRefit}, "refit=the class RidgeRefit must be"),
        ((), {"stages": [Evenly(4)]}, "stages=Evenly.* must be an instance of Stage"),
    ],
)
def test_callback_refuses_arguments_of_another_kind(
    arguments: tuple[object, ...], settings: dict[str, object], words: str
):
    with pytest.raises(InputError, match=words):
        ProgressiveCollapse(*arguments, **settings)  # type: ignore[arg-type]
