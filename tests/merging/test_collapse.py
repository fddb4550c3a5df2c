"""Plan, edit, execute: a shorter model without any training."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging.activity import Activity, KnownActivity
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.collapse import MARK, check_target_depth, collapse, execute, plan
from lcprune.merging.concat import Concat
from lcprune.merging.greedy import GreedyPlanner
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import Drop, Rdsc, spec_of
from lcprune.merging.planners import ContiguousBlock, FixedPlan, OneShotRanking, Planner
from lcprune.merging.progressive import ProgressivePlanner
from lcprune.merging.remeasure import Trail
from lcprune.merging.surgery import second_view
from tests.builders import FAMILIES, Family, save_tiny, tiny_llama, token_batches


def batches() -> list[Batch]:
    return [{"input_ids": ids} for ids in token_batches()]


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_plan_leaves_the_model_as_it_is():
    model = tiny_llama()
    weights, config = weights_of(model), copy.deepcopy(model.config.to_dict())
    plan(model, batches(), target_depth=3)
    assert_same(weights_of(model), weights)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("family", FAMILIES)
def test_collapse_reaches_the_target_and_says_how(family: Family):
    model = tiny_llama(model_type=family)
    history = collapse(model, batches(), target_depth=2)
    assert model.config.num_hidden_layers == history.depth == 2
    assert history.teacher_depth == 6


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))  # type: ignore[return-value]


def adapted_inside(model: PreTrainedModel) -> PreTrainedModel:
    return adapted(model).get_base_model()  # type: ignore[operator, no-any-return]


def packed_into(dtype: torch.dtype) -> Callable[[PreTrainedModel], PreTrainedModel]:
    def pack(model: PreTrainedModel) -> PreTrainedModel:
        for layer in model.model.layers:
            weight = layer.mlp.up_proj.weight
            layer.mlp.up_proj.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        return model

    return pack


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (adapted, r"PeftModel.* adapters .*merge_and_unload\(\)"),
        (adapted_inside, r"The LlamaForCausalLM has adapters \(model\..*\).* merge_and_unload\(\) first"),
        (packed_into(torch.uint8), r"is quantised \(model\.layers\.0\..* is torch\.uint8\).*: load it unquantised"),
        (packed_into(torch.int8), r"is quantised .* is torch\.int8\)"),
        (packed_into(torch.float8_e4m3fn), r"is quantised .* is torch\.float8_e4m3fn\)"),
    ],
)
def test_model_of_more_than_plain_weights_is_refused_and_left(
    wrap: Callable[[PreTrainedModel], PreTrainedModel], words: str
):
    model = wrap(tiny_llama())
    weights = weights_of(model)
    with pytest.raises(InputError, match=words):
        plan(model, batches(), target_depth=4)
    with pytest.raises(InputError, match=words):
        execute(model, MergeHistory(6, (MergeStep((1, 2), spec_of(Drop()), (0.5, 0.5)),)))
    assert_same(weights_of(model), weights)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_model_whose_adapters_were_put_into_its_weights_merges():
    model = adapted(tiny_llama()).merge_and_unload()  # type: ignore[operator]
    assert collapse(model, batches(), target_depth=4).depth == 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
@pytest.mark.parametrize(("wrap", "name"), [(adapted, "PeftModel"), (lambda model: model.model, "LlamaModel")])
def test_model_that_is_no_causal_lm_itself_is_refused_by_name(wrap: Callable[..., PreTrainedModel], name: str):
    with pytest.raises(InputError, match=rf"{name} has no model\.layers, .*: give that model itself"):
        Calibration(wrap(tiny_llama()), batches()).stats(1)


def test_collapse_is_plan_and_then_execute():
    collapsed, planned = tiny_llama(), tiny_llama()
    history = plan(planned, batches(), target_depth=4, operator=Rdsc())
    execute(planned, history)
    assert collapse(collapsed, batches(), target_depth=4, operator=Rdsc()) == history
    assert_same(weights_of(collapsed), weights_of(planned))


@pytest.mark.parametrize("planner", [ProgressivePlanner(), GreedyPlanner()], ids=str)
def test_collapse_does_not_measure_again_what_the_planner_measured(planner: Planner, monkeypatch: pytest.MonkeyPatch):
    planned, collapsed = tiny_llama(), tiny_llama()
    history = plan(planned, batches(), target_depth=3, planner=planner, operator=Concat())
    execute(planned, history, batches())
    known = KnownActivity()
    assert plan(collapsed, batches(), target_depth=3, planner=planner, operator=Concat(), known=known) == history
    monkeypatch.delattr(Trail, "activity")
    execute(collapsed, history, batches(), known=known)
    torch.testing.assert_close(collapsed.state_dict(), planned.state_dict())


def test_activity_is_known_of_the_same_merges_only():
    known, merge = KnownActivity(), MergeStep((1, 2), spec_of(Concat()), (0.5, 0.5))
    activity = (Activity(torch.ones(2, 8), torch.ones(16)),)
    known.note([merge], [3], activity)
    assert known.find([replace(merge, scores={"AngularDistance": 0.1}, global_step=7)], [3]) == activity
    for other in (replace(merge, shares=(0.4, 0.6)), replace(merge, refit={"class_path": "RidgeRefit"})):
        assert known.find([other], [3]) is None
    assert known.find([merge], [2]) is None
    assert known.find([], [3]) is None


def test_default_is_shortgpt():
    model = tiny_llama()
    expected = OneShotRanking().plan(Calibration(model, batches()), Drop(), 4)
    assert plan(model, batches(), target_depth=4).steps == expected


def test_planner_and_operator_given_are_used():
    history = plan(tiny_llama(), batches(), target_depth=5, planner=FixedPlan([[2, 3]]), operator=Rdsc())
    assert [(step.group, step.operator) for step in history.steps] == [((2, 3), spec_of(Rdsc()))]


def test_plan_names_the_teacher(tmp_path: Path):
    folder = save_tiny(tmp_path / "teacher")
    model = tiny_llama().from_pretrained(folder)
    assert plan(model, batches(), target_depth=5).teacher == str(folder)


def test_plan_that_went_through_json_executes_alike():
    model, again = tiny_llama(), tiny_llama()
    history = plan(model, batches(), target_depth=3)
    execute(model, history)
    execute(again, MergeHistory.from_json(history.to_json()))
    assert_same(weights_of(model), weights_of(again))


@pytest.mark.parametrize("target", [-1, 0, 6, 7])
def test_target_outside_the_model_is_refused(target: int):
    with pytest.raises(InputError, match=f"target_depth={target} must lie between 1 and 5, because the model has 6"):
        collapse(tiny_llama(), batches(), target_depth=target)


@pytest.mark.parametrize(("share", "layers"), [("50%", 3), ("75%", 5), ("58.4%", 4), ("58.3%", 3), ("1%", 1)])
def test_share_of_the_layers_is_the_nearest_number_of_them(share: str, layers: int):
    plans = [plan(tiny_llama(), batches(), target_depth=target) for target in (share, layers)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("share", ["100%", "0%", "-5%", "175%", "75", "three", "5 0%", "%", "1e1%"])
def test_share_that_is_none_is_refused(share: str):
    with pytest.raises(
        InputError, match=rf"target_depth='{share}' must be a whole number of layers such as 24, or the"
    ):
        plan(tiny_llama(), batches(), target_depth=share)


def test_share_that_leaves_all_layers_is_refused():
    with pytest.raises(InputError, match="target_depth=95% must lie between 1 and 5, because the model has 6"):
        plan(tiny_llama(), batches(), target_depth="95%")


@pytest.mark.parametrize("target", [1, 5])
def test_target_just_inside_the_model_is_taken(target: int):
    check_target_depth(target, 6)
    model = tiny_llama()
    collapse(model, batches(), target_depth=target)
    assert len(model.model.layers) == target


def test_planners_own_check_is_asked_before_anything_runs():
    with pytest.raises(InputError, match="layer 9 does not exist"):
        plan(tiny_llama(), batches(), target_depth=5, planner=FixedPlan([[8, 9]]))


def test_calibration_without_text_is_refused():
    with pytest.raises(InputError, match="no calibration batches"):
        plan(tiny_llama(), [], target_depth=5, planner=ContiguousBlock())


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (MergeHistory(7, (MergeStep((1, 2), spec_of(Drop()), (0.5, 0.5)),)), "teacher_depth=7 of the plan is not .* 6"),
        (MergeHistory(5, (MergeStep((1, 2), spec_of(Drop()), (0.5, 0.5)),)), "teacher_depth=5 of the plan is not .* 6"),
        (
            MergeHistory(
                6,
                (
                    MergeStep((1, 2), spec_of(Drop()), (0.5, 0.5)),
                    MergeStep((1, 2), {"class_path": "os.system"}, (0.5, 0.5)),
                ),
            ),
            "'os.system' is not an operator",
        ),
    ],
    ids=["deeper", "shallower", "operator"],
)
def test_execute_refuses_a_plan_that_does_not_fit_and_touches_nothing(history: MergeHistory, words: str):
    model = tiny_llama()
    weights = weights_of(model)
    with pytest.raises(InputError, match=words):
        execute(model, history)
    assert_same(weights_of(model), weights)


def test_second_collapse_goes_on_from_the_history_of_the_first():
    model, at_once = tiny_llama(), tiny_llama()
    first = collapse(model, batches(), target_depth=5)
    second = collapse(model, batches(), target_depth=4, history=first)
    assert (second.teacher_depth, second.depth, second.steps[:1]) == (6, 4, first.steps)
    assert [layer for members in second.lineage for layer in members] == list(range(6))
    execute(at_once, second)
    assert_same(weights_of(model), weights_of(at_once))


@pytest.mark.parametrize("call", [plan, collapse])
def test_model_that_was_merged_before_is_no_original(call: Callable[..., MergeHistory]):
    model = tiny_llama()
    first = collapse(model, batches(), target_depth=5)
    for merged in (model, copy.deepcopy(model)):
        with pytest.raises(InputError, match=r"shortened before, from 6 layers to 5: go on from that with history=h1"):
            call(merged, batches(), target_depth=4)
        assert call(merged, batches(), target_depth=4, history=first).teacher_depth == 6


def test_plan_that_begins_with_the_merges_of_a_model_is_carried_on():
    model, at_once = tiny_llama(), tiny_llama()
    first = collapse(model, batches(), target_depth=5, operator=Concat())
    second = plan(model, batches(), target_depth=3, planner=GreedyPlanner(), operator=Concat(), history=first)
    execute(model, second, batches())
    execute(at_once, second, batches())
    torch.testing.assert_close(model.state_dict(), at_once.state_dict())
    with pytest.raises(InputError, match="from 6 layers to 3"):
        plan(model, batches(), target_depth=2)


def test_activity_known_from_before_an_equal_merge_is_not_that_after_it():
    step = MergeStep((1, 2), spec_of(Concat()), (0.5, 0.5))
    once, again = MergeHistory(6, (step,)), FixedPlan([[1, 2, 3]])
    expected, found = tiny_llama(), tiny_llama()
    for model in (expected, found):
        execute(model, once, batches())
    history = collapse(found, batches(), target_depth=4, planner=again, operator=Concat(), history=once)
    execute(expected, history, batches())
    torch.testing.assert_close(found.state_dict(), expected.state_dict())


def test_trial_plan_and_saved_model_carry_no_mark(tmp_path: Path):
    model = tiny_llama()
    history = plan(model, batches(), target_depth=4)
    plan(model, batches(), target_depth=5, planner=GreedyPlanner())
    view = second_view(model)
    execute(view, history)
    assert MARK not in vars(model)
    view.save_pretrained(tmp_path)
    assert MARK not in (tmp_path / "config.json").read_text()
    assert plan(AutoModelForCausalLM.from_pretrained(tmp_path), batches(), target_depth=3).teacher_depth == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_depth": 4, "history": MergeHistory(6)}, "history ends with 6 layers, the model has 5"),
        ({"max_perplexity_ratio": 2.0}, "max_perplexity_ratio=2.0 is about the original"),
        ({"target_depth": 3, "planner": FixedPlan([[4, 5]])}, "leaves 4 of the student's 5 layers, 3 are asked for"),
    ],
    ids=["depth", "ratio", "planner"],
)
def test_going_on_refuses_what_does_not_fit(settings: dict[str, Any], words: str):
    model = tiny_llama()
    first = collapse(model, batches(), target_depth=5, planner=FixedPlan([[1, 2]]))
    with pytest.raises(InputError, match=words):
        collapse(model, batches(), **{"history": first} | settings)


def test_groups_to_go_on_with_are_still_the_teachers():
    model = tiny_llama()
    first = collapse(model, batches(), target_depth=5, planner=FixedPlan([[1, 2]]))
    second = collapse(model, batches(), target_depth=4, planner=FixedPlan([[1, 2], [4, 5]]), history=first)
    assert second.lineage == ((0,), (1, 2), (3,), (4, 5))
