"""What every operator computes, pinned with literal numbers, and what it refuses."""

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging.activity import Activity
from lcprune.merging.architectures import LayerLayout, layout_of
from lcprune.merging.operators import (
    Drop,
    Operator,
    Rdsc,
    ReplaceWithLast,
    WeightedAverage,
    from_spec,
    spec_of,
)
from tests.builders import FAMILIES, Family, tiny_config, tiny_llama

LLAMA = layout_of(tiny_config())
OPERATORS: tuple[Operator, ...] = (
    Drop(),
    Drop(keep="first"),
    Drop(keep="last"),
    Rdsc(),
    ReplaceWithLast(),
    WeightedAverage(),
)

Tensors = dict[str, Tensor]


def one(*values: float, name: str = "mlp.up_proj.weight") -> Tensors:
    return {name: torch.tensor([values])}


def members(model: PreTrainedModel, first: int, number: int) -> list[Tensors]:
    layers = layout_of(model.config).layers_of(model)
    return [dict(layers[index].named_parameters()) for index in range(first, first + number)]


def copies(group: list[Tensors]) -> list[Tensors]:
    return [{name: tensor.detach().clone() for name, tensor in member.items()} for member in group]


def assert_same(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_merge_of_equal_layers_is_the_layer_exactly(operator: Operator, dtype: torch.dtype):
    layer = members(tiny_llama(dtype=dtype), 2, 1)[0]
    assert_same(operator.merge([layer] * 4, (0.1, 0.2, 0.3, 0.4), LLAMA), layer)


def test_rdsc_of_three_layers_is_the_second_plus_the_third_minus_the_base():
    merged = Rdsc().merge([one(1.0, 2.0), one(4.0, 0.0), one(10.0, -3.0)], (1 / 3,) * 3, LLAMA)
    assert merged["mlp.up_proj.weight"].tolist() == [[13.0, -5.0]]


def test_weighted_average_of_three_layers_weighs_by_share():
    merged = WeightedAverage().merge([one(1.0, 2.0), one(4.0, 0.0), one(10.0, -4.0)], (0.5, 0.25, 0.25), LLAMA)
    assert merged["mlp.up_proj.weight"].tolist() == [[4.0, 0.0]]


def test_weighted_average_with_all_weight_on_one_member_is_that_member():
    group = members(tiny_llama(), 1, 3)
    merged = WeightedAverage().merge(group, (0.0, 0.0, 1.0), LLAMA)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, group[0 if LLAMA.is_norm(name) else 2][name].detach())


@pytest.mark.parametrize("operator", [Rdsc(), WeightedAverage()], ids=str)
def test_sums_are_accumulated_in_float32(operator: Operator):
    # bfloat16 has no number between 256 and 258: rounded after every member, the sum would never leave 256.
    group = [{name: tensor.bfloat16() for name, tensor in one(value).items()} for value in (0.0, 256.0, 1.0, 1.0)]
    shares = (0.0, 1.0, 1.0, 1.0)  # no fractions, so that every term is exact
    merged = operator.merge(group, shares, LLAMA)["mlp.up_proj.weight"]
    assert merged.dtype == torch.bfloat16
    assert merged.item() == 258.0


@pytest.mark.parametrize("size", [2, 3, 5])
def test_replace_with_last_is_what_lacos_published_code_computes(size: int):
    group = [{name: tensor.double() for name, tensor in member.items()} for member in members(tiny_llama(), 0, size)]
    # LaCo's notebooks: `base += member - base` member after member, reading the base that was just overwritten.
    naive = {name: tensor.clone() for name, tensor in group[0].items()}
    for member in group[1:]:
        for name in naive:
            if not LLAMA.is_norm(name):
                naive[name] += member[name] - naive[name]
    merged = ReplaceWithLast().merge(group, (1 / size,) * size, LLAMA)
    for name in naive:
        torch.testing.assert_close(merged[name], naive[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operator", [Rdsc(), ReplaceWithLast(), WeightedAverage()], ids=str)
def test_norms_of_the_base_are_kept(operator: Operator, family: Family):
    model = tiny_llama(model_type=family)
    group = members(model, 1, 3)
    norms = [name for name in group[0] if "norm" in name]
    assert len(norms) == (4 if family == "qwen3" else 2)
    merged = operator.merge(group, (0.2, 0.3, 0.5), layout_of(model.config))
    for name in norms:
        assert torch.equal(merged[name], group[0][name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operator", [Rdsc(), ReplaceWithLast(), WeightedAverage()], ids=str)
def test_everything_but_norms_is_merged(operator: Operator, family: Family):
    model = tiny_llama(model_type=family)
    group = members(model, 1, 3)
    merged = operator.merge(group, (0.2, 0.3, 0.5), layout_of(model.config))
    changed = {name for name in merged if not torch.equal(merged[name], group[0][name])}
    assert changed == {name for name in merged if "norm" not in name}


def test_biases_of_projections_merge_like_their_weights():
    group = members(tiny_llama(model_type="qwen2"), 1, 3)
    name = "self_attn.k_proj.bias"
    merged = Rdsc().merge(group, (1 / 3,) * 3, layout_of(tiny_config(model_type="qwen2")))
    torch.testing.assert_close(merged[name], (group[1][name] + group[2][name] - group[0][name]).detach())


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_merge_leaves_its_inputs_untouched(operator: Operator):
    group = members(tiny_llama(), 1, 3)
    before = copies(group)
    with torch.no_grad():
        operator.merge(group, (0.2, 0.3, 0.5), LLAMA)
    for member, copy in zip(group, before, strict=True):
        assert_same(member, copy)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_merged_tensors_have_storage_of_their_own(operator: Operator):
    group = members(tiny_llama(), 1, 2)
    inputs = {tensor.untyped_storage().data_ptr() for member in group for tensor in member.values()}
    with torch.no_grad():
        merged = operator.merge(group, (0.5, 0.5), LLAMA)
    assert not inputs & {tensor.untyped_storage().data_ptr() for tensor in merged.values()}


@pytest.mark.parametrize(
    ("keep", "shares", "kept"),
    [
        ("first", (0.1, 0.8, 0.1), 0),
        ("last", (0.1, 0.8, 0.1), 2),
        ("strongest", (0.1, 0.8, 0.1), 1),
        ("strongest", (0.1, 0.1, 0.8), 2),
        ("strongest", (0.2, 0.4, 0.4), 1),
        ("strongest", (1 / 3, 1 / 3, 1 / 3), 0),
    ],
)
def test_drop_keeps_the_member_it_is_told_to_and_the_earliest_of_equals(
    keep: str, shares: tuple[float, ...], kept: int
):
    group = members(tiny_llama(), 1, 3)
    assert_same(Drop(keep=keep).merge(group, shares, LLAMA), group[kept])  # type: ignore[arg-type]


def test_drop_refuses_an_unknown_keep():
    with pytest.raises(InputError, match="keep='weakest' of Drop must be strongest, first or last"):
        Drop(keep="weakest")  # type: ignore[arg-type]


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_operator_survives_its_spec(operator: Operator):
    assert from_spec(spec_of(operator)) == operator


@pytest.mark.parametrize("class_path", ["Rdsc", "lcprune.Rdsc", "lcprune.merging.operators.Rdsc"])
def test_operator_is_found_by_short_and_full_names(class_path: str):
    assert from_spec({"class_path": class_path}) == Rdsc()


@dataclass(frozen=True)
class Mine(Operator):
    """An operator of a module that the program has imported."""

    strength: float = 1.0

    def merge(
        self,
        members: Sequence[Tensors],
        shares: Sequence[float],
        layout: LayerLayout,
        activity: Sequence[Activity] = (),
    ) -> Tensors:
        """The first member, weaker or stronger."""
        return {name: self.strength * tensor for name, tensor in members[0].items()}


def test_operator_of_an_imported_module_is_found(monkeypatch: pytest.MonkeyPatch):
    module = types.ModuleType("my_operators")
    module.Mine = Mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_operators", module)
    assert from_spec({"class_path": "my_operators.Mine", "init_args": {"strength": 0.5}}) == Mine(0.5)


@pytest.mark.parametrize(
    "class_path",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.nn.Linear",
        "lcprune.merging.operators.Operator",
        "lcprune.merging.operators.from_spec",
        "lcprune.merging.planners.OneShotRanking",
        "lcprune.no_such_module.Drop",
        "no.such.module.Drop",
        "Dorp",
        "",
        ".",
        "lcprune..Drop",
        "lcprune.cli.Drop",
        "None",
    ],
)
def test_class_path_that_names_no_operator_is_refused(class_path: str):
    with pytest.raises(InputError, match=r"is not an operator; known are .*Drop.*Rdsc"):
        from_spec({"class_path": class_path})


def test_module_that_is_not_imported_yet_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trojan_horse.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    with pytest.raises(InputError, match=r"trojan_horse\.Drop"):
        from_spec({"class_path": "trojan_horse.Drop"})
    assert "trojan_horse" not in sys.modules


@pytest.mark.parametrize(
    ("class_path", "init_args", "words"),
    [
        ("Drop", {"kep": "first"}, "Drop does not take 'kep'; its arguments are: keep"),
        ("Rdsc", {"keep": "first"}, "Rdsc does not take 'keep'"),
        ("Drop", {"keep": "weakest"}, "keep='weakest'"),
        ("Drop", ["first"], "Drop does not take 'init_args'"),
    ],
)
def test_arguments_that_an_operator_does_not_take_are_refused(class_path: str, init_args: object, words: str):
    with pytest.raises(InputError, match=words):
        from_spec({"class_path": class_path, "init_args": init_args})


def test_key_beside_the_arguments_is_refused():
    with pytest.raises(InputError, match=r"operator class_path='Drop' has 'keep' beside it, .* put it under init_args"):
        from_spec({"class_path": "Drop", "keep": "first"})


def test_class_variable_is_not_taken_for_an_argument():
    with pytest.raises(InputError, match="Rdsc does not take 'elementwise'; its arguments are: none"):
        from_spec({"class_path": "Rdsc", "init_args": {"elementwise": False}})


# To import lcprune.__main__ is to run it.
def test_plan_cannot_run_the_command_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["lcprune"])
    with pytest.raises(InputError, match="is not an operator"):
        from_spec({"class_path": "lcprune.__main__.Drop"})
