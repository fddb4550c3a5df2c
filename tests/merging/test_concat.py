"""A concatenated layer is the sum of what its kept heads and channels contribute, each as in its own layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.activity import Activity
from lcprune.merging.architectures import Branch, LayerLayout, layout_of
from lcprune.merging.concat import Concat, quota
from lcprune.merging.lineage import MergeStep
from lcprune.merging.operators import spec_of
from tests.builders import Family, tiny_llama, token_batches
from tests.merging.planning import assert_same, layers_of

KINDS: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "gpt2")
"""Grouped queries, biases, norms of queries and keys, norms stored minus one, fused projections, Conv1D."""
BASE = 2
IDS = token_batches(1, 2, 12)[0]
EQUAL = [Activity(torch.ones(2, 1), torch.ones(2))] * 2
"""Of two layers of `_hand_made`: all heads and channels do as much."""


@contextmanager
def _isolated(layer: nn.Module, branch: Branch, given: Tensor, kept: Tensor | None) -> Iterator[list[Tensor]]:
    """A branch gets `given` in front of its norm, and only the inputs `kept` reach its consumer: what that writes."""
    written: list[Tensor] = []
    consumer = layer.get_submodule(branch.consumer)

    def give(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given, *args[1:])

    def mask(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if kept is None else (args[0] * kept.to(args[0]), *args[1:])

    def write(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        bias = getattr(module, "bias", None)
        written.append(output if bias is None else output - bias)

    handles = [
        layer.get_submodule(branch.norm).register_forward_pre_hook(give),
        consumer.register_forward_pre_hook(mask),
        consumer.register_forward_hook(write),
    ]
    try:
        yield written
    finally:
        for handle in handles:
            handle.remove()


def _contribution(
    model: PreTrainedModel, place: int, branch: Branch, given: Tensor, kept: Tensor | None = None
) -> Tensor:
    with _isolated(layers_of(model)[place], branch, given, kept) as written, torch.no_grad():
        model(IDS)
    return written[-1].reshape(*given.shape)


def _choices(model: PreTrainedModel, layout: LayerLayout) -> tuple[list[Activity], dict[Branch, list[Tensor]]]:
    """Activity that makes the first member keep every other unit and the second the rest; and the masks of these."""
    assert layout.mlp is not None
    layer, heads = layers_of(model)[BASE], layout.kv_heads_of(model.config)
    width, channels = (
        layer.get_submodule(branch.consumer).weight.shape[0 if layout.transposed else 1]
        for branch in (layout.attention, layout.mlp)
    )
    kept_heads = [torch.arange(heads) % 2 == place for place in (0, 1)]
    kept_channels = [(torch.arange(channels) // 3) % 2 == place for place in (0, 1)]
    activity = [
        Activity(head[:, None].float().repeat(1, width // heads), channel.float())
        for head, channel in zip(kept_heads, kept_channels, strict=True)
    ]
    masks = {
        layout.attention: [head.repeat_interleave(width // heads) for head in kept_heads],
        layout.mlp: kept_channels,
    }
    return activity, masks


def _equal_inner_norms(model: PreTrainedModel) -> None:
    """One vector serves all heads of the merged layer: only where members agree is it anybody's own."""
    first, second = layers_of(model)[BASE : BASE + 2]
    for name, parameter in second.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            parameter.data = first.get_parameter(name).data.clone()


@pytest.mark.parametrize("family", KINDS)
def test_concat_is_the_sum_of_the_kept_units_contributions(family: Family):
    model = tiny_llama(model_type=family)
    layout = layout_of(model.config)
    _equal_inner_norms(model)
    activity, masks = _choices(model, layout)
    given = torch.randn(*IDS.shape, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = {
        branch: sum(_contribution(model, BASE + m, branch, given, kept) for m, kept in enumerate(masks[branch]))
        for branch in masks
    }
    step = MergeStep((BASE, BASE + 1), spec_of(Concat(selection="joint")), (0.5, 0.5))
    surgery.apply(model, step, lambda wanted: activity)
    for branch, contribution in expected.items():
        merged = _contribution(model, BASE, branch, given)
        torch.testing.assert_close(merged, contribution, rtol=1e-5, atol=1e-5, msg=f"{family} {branch.consumer}")
        assert merged.abs().max() > 1e-3


def test_query_heads_are_paired_as_the_model_pairs_them_not_tiled_as_published():
    """Query head j belongs to KV head j // n_rep: the published code's mask pairs them the other way round."""
    model = tiny_llama()
    layout = layout_of(model.config)
    activity, masks = _choices(model, layout)
    given = torch.randn(*IDS.shape, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    heads, width = layout.kv_heads_of(model.config), len(masks[layout.attention][0])
    head_dim = width // model.config.num_attention_heads
    tiled = [(torch.arange(width) // head_dim) % heads % 2 == place for place in (0, 1)]
    paired, published = (
        sum(_contribution(model, BASE + m, layout.attention, given, kept) for m, kept in enumerate(both))
        for both in (masks[layout.attention], tiled)
    )
    step = MergeStep((BASE, BASE + 1), spec_of(Concat(selection="joint")), (0.5, 0.5))
    surgery.apply(model, step, lambda wanted: activity)
    merged = _contribution(model, BASE, layout.attention, given)
    torch.testing.assert_close(merged, paired, rtol=1e-5, atol=1e-5)
    assert (merged - published).norm() / published.norm() > 0.1


def test_concat_does_not_take_the_precision_of_a_run():
    plain, mixed = tiny_llama(model_type="gpt_neox"), tiny_llama(model_type="gpt_neox")
    activity, _ = _choices(plain, layout_of(plain.config))
    step = MergeStep((BASE, BASE + 1), spec_of(Concat()), (0.5, 0.5))
    surgery.apply(plain, step, lambda wanted: activity)
    with torch.autocast("cpu", torch.bfloat16):
        surgery.apply(mixed, step, lambda wanted: activity)
    assert_same(mixed, plain)


def test_mean_norms_are_the_published_plain_average_and_are_not_exact():
    model = tiny_llama()
    layout = layout_of(model.config)
    activity, masks = _choices(model, layout)
    assert layout.mlp is not None
    gammas = [layers_of(model)[BASE + m].input_layernorm.weight.clone() for m in (0, 1)]
    given = torch.randn(*IDS.shape, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = sum(_contribution(model, BASE + m, layout.mlp, given, kept) for m, kept in enumerate(masks[layout.mlp]))
    published = Concat(selection="joint", norms="mean")
    surgery.apply(model, MergeStep((BASE, BASE + 1), spec_of(published), (0.5, 0.5)), lambda wanted: activity)
    torch.testing.assert_close(layers_of(model)[BASE].input_layernorm.weight.data, (gammas[0] + gammas[1]) / 2)
    merged = _contribution(model, BASE, layout.mlp, given)
    assert (merged - expected).norm() / expected.norm() > 0.01


@pytest.mark.parametrize(
    ("shares", "number", "counts"),
    [
        ([0.3, 0.4, 0.3], 9, [2, 5, 2]),
        ([0.5, 0.5], 3, [2, 1]),
        ([0.1, 0.9], 3, [0, 3]),
        ([1 / 3] * 3, 3, [1, 1, 1]),
        ([1.0, 0.0], 4, [4, 0]),
        ([0.29, 0.71], 100, [29, 71]),  # 100 * 0.29 is 28.999999999999996
    ],
)
def test_quota_floors_all_but_the_largest_share(shares: list[float], number: int, counts: list[int]):
    assert quota(shares, number) == counts


def _hand_made(down: Sequence[Sequence[float]], mark: float) -> dict[str, Tensor]:
    """A Llama layer of hidden size 2, two heads of size 1, two channels; row r of `gate` and `up` holds mark + r."""
    rows = torch.tensor([[mark, mark], [mark + 1, mark + 1]])
    members = {f"self_attn.{name}_proj.weight": rows.clone() for name in "qkvo"}
    members |= {"mlp.gate_proj.weight": rows.clone(), "mlp.up_proj.weight": rows.clone()}
    members |= {"mlp.down_proj.weight": torch.tensor(down)}
    return members | {f"{norm}.weight": torch.ones(2) for norm in ("input_layernorm", "post_attention_layernorm")}


@pytest.mark.parametrize(
    ("operator", "shares", "gate", "down"),
    [
        # s_i = E|z_i| * sum_o |W_down[o, i]|: member 0 has 1 * 2 and 0.5 * 3, member 1 has 0.1 * 2 and 2 * 2.
        (Concat(selection="joint"), (0.5, 0.5), [10, 21], [[1.0, 1.0], [1.0, 1.0]]),
        (Concat(), (0.5, 0.5), [10, 21], [[1.0, 1.0], [1.0, 1.0]]),
        (Concat(), (0.6, 0.4), [10, 11], [[1.0, -3.0], [1.0, 0.0]]),
    ],
)
def test_channels_are_kept_by_activity_times_weight(
    operator: Concat, shares: tuple[float, float], gate: list[int], down: list[list[float]]
):
    members = [_hand_made([[1.0, -3.0], [1.0, 0.0]], 10), _hand_made([[1.0, 1.0], [1.0, 1.0]], 20)]
    activity = [
        Activity(torch.ones(2, 1), torch.tensor([1.0, 0.5])),
        Activity(torch.ones(2, 1), torch.tensor([0.1, 2.0])),
    ]
    layout = layout_of(tiny_llama().config)
    merged = operator.merge(members, shares, layout, activity)
    assert merged["mlp.gate_proj.weight"][:, 0].tolist() == gate
    assert merged["mlp.down_proj.weight"].tolist() == down


def test_weights_that_read_a_channel_count_by_their_sizes():
    # 1 + |-1| beats 1 + 0.5, whatever 1 - 1 is.
    members = [_hand_made([[1.0, 1.0], [-1.0, 0.5]], 10), _hand_made([[1.0, 0.0], [1.0, 0.0]], 20)]
    merged = Concat().merge(members, (0.5, 0.5), layout_of(tiny_llama().config), EQUAL)
    assert merged["mlp.gate_proj.weight"][:, 0].tolist() == [10, 20]


def test_member_that_keeps_no_unit_has_no_part_in_the_norms():
    first, second = _hand_made([[1.0, 2.0], [3.0, 4.0]], 1), _hand_made([[1.0, 2.0], [3.0, 4.0]], 5)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        second[f"{norm}.weight"] = torch.full((2,), 1.5)
    merged = Concat().merge([first, second], (1.0, 0.0), layout_of(tiny_llama().config), EQUAL)
    assert_same(merged, first)


def test_concat_leaves_its_inputs_alone():
    members = [_hand_made([[1.0, 2.0], [3.0, 4.0]], 1), _hand_made([[4.0, 3.0], [2.0, 1.0]], 5)]
    before = [{name: tensor.clone() for name, tensor in member.items()} for member in members]
    Concat().merge(members, (0.5, 0.5), layout_of(tiny_llama().config), EQUAL)
    for member, kept in zip(members, before, strict=True):
        assert all(torch.equal(member[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize(("field", "value"), [("selection", "best"), ("norms", "sum")])
def test_concat_refuses_words_it_does_not_know(field: str, value: str):
    with pytest.raises(InputError, match=f"{field}='{value}' must be"):
        Concat(**{field: value})  # type: ignore[arg-type]
