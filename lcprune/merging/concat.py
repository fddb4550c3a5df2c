"""Concatenation of the members' best parts: CoMe's merge operator (arXiv:2510.15304, section 3), without its defects.

A layer's attention is a sum over KV heads (each with the query heads that share it), its MLP a sum over channels. The
merged layer keeps N of the k * N units of its members, side by side, and so has the shape of one of them:

    score of channel i      s_i = E|z_i| * sum_o |W_down[o, i]|                     z = input of the down projection
    score of KV head g      the same with W_o, averaged over the inputs of all query heads that share g
    quota of member m       n_m = floor(N * share_m); the member with the largest share takes the rest

Rows of the producers (query, key, value, gate, up) and columns of the consumer (output, down) are cut per unit and
concatenated in the order of the members; the consumer's bias is the average of theirs by share. Hugging Face pairs
query head j with KV head `j // (H / K)`, so a unit of the attention is a run of H / K query heads.

Every member's units were trained behind its own normalisation n(x) * gamma_m + beta_m. With `norms="fold"` the merged
layer normalises by one gamma and beta, and the difference goes into what reads it:

    W <- W_m diag(gamma_m / gamma)        bias <- bias_m + W_m (beta_m - gamma_m / gamma * beta)
    gamma^2 = mean of gamma_m^2           beta = average by kept units, exact only where projections have biases

so that every kept unit sees exactly what it saw in its own layer. Two kinds of norm cannot be folded, and are averaged
by the number of units that each member keeps: those of queries and keys (one vector for all heads; where there is a
vector over all heads, every slice of it moves with its head) and those between a consumer and the stream.

A kept head gets another number. Where positions are slopes that belong to a head's number (ALiBi) it looks further or
less far than it did in its own layer.

Legend: `M` members, `N` units, `O` outputs and `D` inputs of a producer, `I` inputs of a consumer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lcprune.errors import InputError
from lcprune.merging.activity import Activity
from lcprune.merging.architectures import Branch, LayerLayout, Producer
from lcprune.merging.operators import LayerTensors, Operator

Kept: TypeAlias = list[Tensor]
"""For every member the indices of the units that it keeps, ascending; N in all."""


@dataclass(frozen=True)
class Concat(Operator):
    """The strongest KV heads and MLP channels of every member, side by side (CoMe, arXiv:2510.15304)."""

    selection: Literal["quota", "joint"] = "quota"
    """`quota`: every member keeps as many units as its share says; `joint`: one ranking over all members' units."""
    norms: Literal["fold", "mean"] = "fold"
    """`fold`: kept units see what they saw before; `mean`: plain average of the members' norms, as CoMe published."""

    needs_activity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        wrong = []
        if self.selection not in ("quota", "joint"):
            wrong.append(f"selection={self.selection!r} must be quota or joint")
        if self.norms not in ("fold", "mean"):
            wrong.append(f"norms={self.norms!r} must be fold or mean")
        if wrong:
            raise InputError(f"Concat: {'; '.join(wrong)}.")

    def check(self, layout: LayerLayout) -> None:
        """Refuses families whose MLPs consist of experts, or whose heads have norms of their own."""
        branches = layout.attention, _mlp_of(layout)
        for norm in layout.norms:
            if _branch_of(norm, branches) is None:
                raise InputError(
                    f"operator Concat cannot merge layers of {layout.model_type}, whose heads have norms of their own "
                    f"({norm}): use Drop or another operator that does not take layers apart."
                )

    def merge(
        self,
        members: Sequence[LayerTensors],
        shares: Sequence[float],
        layout: LayerLayout,
        activity: Sequence[Activity] = (),
    ) -> dict[str, Tensor]:
        """The merged layer, on the base's device; scored, folded and averaged in float32 or better."""
        branches = (layout.attention, _mlp_of(layout))
        assert len(activity) == len(members), "Concat needs the activity of every member"
        device = next(iter(members[0].values())).device
        members = [{name: tensor.to(device) for name, tensor in member.items()} for member in members]
        choose = _by_quota if self.selection == "quota" else _jointly
        means = ([one.heads_KI for one in activity], [one.channels_F[:, None] for one in activity])
        kept = {}
        for branch, means_NI in zip(branches, means, strict=True):
            scores = [_scores(*each, branch, layout) for each in zip(members, means_NI, strict=True)]
            kept[branch] = choose(torch.stack(scores), shares)
        merged = _merged_norms(members, kept, layout, self.norms)
        for branch in branches:
            folds = _folds(members, merged, branch, layout) if self.norms == "fold" else [_AS_IT_IS] * len(members)
            for producer in branch.producers:
                merged |= _merged_producer(members, producer, branch, kept[branch], folds, layout)
            merged |= _merged_consumer(members, branch, kept[branch], shares, layout)
        assert merged.keys() == members[0].keys(), f"{layout.model_type}: {merged.keys() ^ members[0].keys()}"
        return {name: merged[name].to(theta.dtype) for name, theta in members[0].items()}


def quota(shares: Sequence[float], number: int) -> list[int]:
    """How many of `number` units each member keeps: floor(number * share), the largest share takes the rest.

    Example:
        >>> quota([0.3, 0.4, 0.3], 9)
        [2, 5, 2]
    """
    # 0.1 * 3 + ... may leave 2.9999999 for 3: that is no unit less.
    counts = [floor(number * share + 1e-6) for share in shares]
    counts[max(range(len(shares)), key=lambda member: (shares[member], -member))] += number - sum(counts)
    return counts


def _mlp_of(layout: LayerLayout) -> Branch:
    if layout.mlp is None:
        raise InputError(
            f"operator Concat cannot merge layers of {layout.model_type}, whose MLPs consist of experts: use Drop or "
            "another operator that does not take layers apart."
        )
    return layout.mlp


def _precise(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _outputs_first(weight: Tensor, layout: LayerLayout) -> Tensor:
    """[outputs, inputs] whichever way a family stores it; its own inverse."""
    return weight.T if layout.transposed else weight


# Which units stay.


def _scores(member: LayerTensors, means_NI: Tensor, branch: Branch, layout: LayerLayout) -> Tensor:
    """[N] mean over a unit's inputs of E|x| times the absolute sum of the weights that read it."""
    weight_DI = _precise(_outputs_first(member[f"{branch.consumer}.weight"], layout))
    means_NI = means_NI.to(weight_DI)
    return (means_NI * weight_DI.abs().sum(0).view_as(means_NI)).mean(1)


def _by_quota(scores_MN: Tensor, shares: Sequence[float]) -> Kept:
    """Every member's best units, as many as its share allows; among equals the first."""
    order_MN = scores_MN.argsort(dim=1, descending=True, stable=True)
    counts = quota(shares, scores_MN.shape[1])
    return [order_N[:count].sort().values for order_N, count in zip(order_MN, counts, strict=True)]


def _jointly(scores_MN: Tensor, shares: Sequence[float]) -> Kept:
    """The best N units of all members together; among equals the earlier member's."""
    number = scores_MN.shape[1]
    best = scores_MN.flatten().argsort(descending=True, stable=True)[:number]
    return [(best[best // number == member] % number).sort().values for member in range(len(scores_MN))]


# Norms.


class _Fold(NamedTuple):
    """What must be multiplied into, and added behind, a member's producers for them to read the merged norm."""

    ratio_D: Tensor | None
    shift_D: Tensor | None


_AS_IT_IS = _Fold(None, None)


def _merged_norms(
    members: Sequence[LayerTensors], kept: Mapping[Branch, Kept], layout: LayerLayout, norms: str
) -> dict[str, Tensor]:
    """Every parameter of a norm of the merged layer, in the type that it will be stored in."""
    merged = {}
    for name in filter(layout.is_norm, members[0]):
        thetas = [_precise(member[name]) for member in members]
        module = name.rpartition(".")[0]
        readers = [branch for branch in kept if branch.norm == module]
        if norms == "mean":
            theta = torch.stack(thetas).mean(0)
        elif readers and name.endswith(".weight"):
            taking_part = [m for m in range(len(members)) if any(len(kept[branch][m]) for branch in readers)]
            theta = _common_scale([thetas[m] for m in taking_part], layout.norm_offset, members[0][name].dtype)
        else:
            branch = _branch_of(module, list(kept))
            assert branch is not None, module
            if _spans_all_units(members[0], name, branch, layout):
                number = sum(map(len, kept[branch]))
                slices = [theta.view(number, -1)[units] for theta, units in zip(thetas, kept[branch], strict=True)]
                theta = torch.cat(slices).flatten()
            else:
                theta = _by_units(thetas, kept[branch])
        merged[name] = theta.to(members[0][name].dtype)
    return merged


def _branch_of(module: str, branches: Sequence[Branch]) -> Branch | None:
    """The branch that a norm stands in: in front of it, behind it, or inside (queries and keys); None if in none."""
    inside = module.rpartition(".")[0]
    for branch in branches:
        if module in (branch.norm, branch.norm_after) or (inside and branch.consumer.startswith(f"{inside}.")):
            return branch
    return None


def _spans_all_units(member: LayerTensors, name: str, branch: Branch, layout: LayerLayout) -> bool:
    """Whether a norm has an entry for every output of a producer (olmo2) instead of one head's (qwen3)."""
    if name.rpartition(".")[0] in (branch.norm, branch.norm_after):
        return False
    single = [producer.name for producer in branch.producers if producer.blocks == "one"]
    return len(member[name]) in {len(_outputs_first(member[f"{each}.weight"], layout)) for each in single}


def _common_scale(thetas: Sequence[Tensor], offset: float, dtype: torch.dtype) -> Tensor:
    """[D] root mean square of gamma = theta + offset over members, so that no ratio to it exceeds sqrt(M).

    Signs are those of the sum; where all are 0 (or round to it) the common scale is 1.
    """
    theta_D = thetas[0]
    if len(thetas) > 1:
        gamma_MD = torch.stack(list(thetas)) + offset
        sign_D = torch.where(gamma_MD.sum(0) < 0, -1.0, 1.0)
        theta_D = sign_D * gamma_MD.square().mean(0).sqrt() - offset
    stored_D = theta_D.to(dtype).to(theta_D.dtype)
    return torch.where(stored_D + offset == 0, 1 - offset, stored_D)


def _by_units(thetas: Sequence[Tensor], kept: Kept) -> Tensor:
    """Average over the members by how many units each keeps."""
    total = sum(map(len, kept))
    return torch.stack([len(units) / total * theta for theta, units in zip(thetas, kept, strict=True)]).sum(0)


def _folds(
    members: Sequence[LayerTensors], merged: Mapping[str, Tensor], branch: Branch, layout: LayerLayout
) -> list[_Fold]:
    """Per member what turns a projection of the member's normalised stream into one of the merged layer's."""
    gamma, beta = f"{branch.norm}.weight", f"{branch.norm}.bias"
    if gamma not in merged:
        return [_AS_IT_IS] * len(members)
    folds = []
    for member in members:
        common_D = _precise(merged[gamma]) + layout.norm_offset
        ratio_D = (_precise(member[gamma]) + layout.norm_offset) / common_D
        shift_D = _precise(member[beta]) - ratio_D * _precise(merged[beta]) if beta in merged else None
        folds.append(_Fold(ratio_D, shift_D))
    return folds


# Projections.


def _rows(producer: Producer, outputs: int, inputs: int, number: int, units: Tensor) -> list[Tensor]:
    """Per block the rows of a producer that belong to `units`, unit by unit.

    Args:
        producer: The projection.
        outputs: How many rows it has.
        inputs: How many inputs the branch's consumer has: as many as there are query rows.
        number: How many units there are.
        units: Indices of those asked for.
    """
    sizes = {"one": [outputs], "halves": [outputs // 2] * 2, "qkv": [inputs] + [(outputs - inputs) // 2] * 2}
    rows, start = [], 0
    for size in sizes[producer.blocks]:
        rows.append(_slices(units, size // number) + start)
        start += size
    return rows


def _slices(units: Tensor, width: int) -> Tensor:
    """Indices of the entries of these units, `width` each."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _merged_producer(
    members: Sequence[LayerTensors],
    producer: Producer,
    branch: Branch,
    kept: Kept,
    folds: Sequence[_Fold],
    layout: LayerLayout,
) -> dict[str, Tensor]:
    """Block by block, member by member, the rows of the kept units."""
    number = sum(map(len, kept))
    inputs = _outputs_first(members[0][f"{branch.consumer}.weight"], layout).shape[1]
    weights = [_outputs_first(member[f"{producer.name}.weight"], layout) for member in members]
    rows = [_rows(producer, len(weights[0]), inputs, number, units) for units in kept]
    places = [(member, rows_of[block]) for block in range(len(rows[0])) for member, rows_of in enumerate(rows)]
    cuts, biases = [], []
    for member, rows_O in places:
        ratio_D, shift_D = folds[member]
        cut_OD = _precise(weights[member][rows_O])
        cuts.append(cut_OD if ratio_D is None else cut_OD * ratio_D)
        if f"{producer.name}.bias" in members[0]:
            bias_O = _precise(members[member][f"{producer.name}.bias"][rows_O])
            biases.append(bias_O if shift_D is None else bias_O + cut_OD @ shift_D)
    merged = {f"{producer.name}.weight": _outputs_first(torch.cat(cuts), layout).contiguous()}
    return merged | ({f"{producer.name}.bias": torch.cat(biases)} if biases else {})


def _merged_consumer(
    members: Sequence[LayerTensors], branch: Branch, kept: Kept, shares: Sequence[float], layout: LayerLayout
) -> dict[str, Tensor]:
    """Member by member the columns of the kept units; biases averaged by share."""
    number = sum(map(len, kept))
    weights = [_outputs_first(member[f"{branch.consumer}.weight"], layout) for member in members]
    width = weights[0].shape[1] // number
    columns = [weight[:, _slices(units, width)] for weight, units in zip(weights, kept, strict=True)]
    merged = {f"{branch.consumer}.weight": _outputs_first(torch.cat(columns, 1), layout).contiguous()}
    name = f"{branch.consumer}.bias"
    if name in members[0]:
        biases = [share * _precise(member[name]) for share, member in zip(shares, members, strict=True)]
        merged[name] = torch.stack(biases).sum(0)
    return merged
