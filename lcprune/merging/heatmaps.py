"""What a model's layers have in common, as matrices to be looked at (LaCo, arXiv:2402.11187, figures 4 and 5).

    weight_distances   || W_l - W_{l+1} ||  for every matrix of a layer and every pair of neighbours
    state_cosines      E cos(h_a, h_b)      for every two boundaries of the residual stream

h_b is the residual stream at boundary b: h_0 the embeddings, h_b the output of layer b - 1. Legend: `B` batch,
`T` tokens, `N` unmasked tokens, `D` hidden, `L` layers, `S` = L + 1 boundaries.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import hypot

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, evaluating, hidden_states, layer_outputs, mask_of, unmasked
from lcprune.merging.progress import track

TOKEN_CHUNK = 256
"""Tokens whose states at all boundaries exist in float32 at once."""


@dataclass(frozen=True)
class WeightDistances:
    """How far the matrices of neighbouring layers are from each other."""

    matrices: tuple[str, ...]
    """Names inside a layer, e.g. `self_attn.q_proj.weight`, of what all layers have."""
    raw: tuple[tuple[float, ...], ...]
    """Per pair of layers l, l + 1 and matrix: the L2 distance."""
    normalised: tuple[tuple[float, ...], ...]
    """The same divided by the root of the sum of both squared norms: 0 = equal, 1 = orthogonal."""


@torch.no_grad()
def weight_distances(model: PreTrainedModel) -> WeightDistances:
    """L2 distances between the corresponding weight matrices of adjacent layers, in float32.

    Only two matrices exist in float32 at a time.
    """
    layers = layout_of(model.config).layers_of(model)
    everywhere = set.intersection(*({name for name, _ in layer.named_parameters()} for layer in layers))
    first = [(name, weight) for name, weight in layers[0].named_parameters() if name in everywhere]
    matrices = tuple(name for name, weight in first if weight.dim() > 1)
    raw, normalised = [], []
    for left, right in track(list(pairwise(layers)), "comparing the weights of neighbours"):
        pairs = [(left.get_parameter(name), right.get_parameter(name)) for name in matrices]
        measured = [_distance(here, there) for here, there in pairs]
        raw.append(tuple(distance for distance, _ in measured))
        normalised.append(tuple(distance / size if size > 0 else 0.0 for distance, size in measured))
    return WeightDistances(matrices, tuple(raw), tuple(normalised))


def _distance(left: Tensor, right: Tensor) -> tuple[float, float]:
    """|| left - right || and the root of the sum of both squared norms."""
    left, right = left.float(), right.to(left.device).float()
    return torch.dist(left, right).item(), hypot(left.norm().item(), right.norm().item())


def state_cosines(model: PreTrainedModel, batches: Sequence[Batch]) -> Tensor:
    """Mean cosine between the stream at every two boundaries, over all unmasked tokens.

    One batch's states at all boundaries are in memory at a time, and `TOKEN_CHUNK` tokens of them in float32.

    Args:
        model: A causal LM of a known family; not changed.
        batches: Calibration batches.

    Returns:
        Symmetric [S, S] with ones on the diagonal, float64 on the CPU.
    """
    layers = layout_of(model.config).layers_of(model)
    total_SS = torch.zeros(len(layers) + 1, len(layers) + 1, dtype=torch.float64)
    tokens = 0
    with evaluating(model), _boundaries(layers) as states:
        for batch in track(batches, "comparing the stream at all boundaries"):
            hidden_states(model, batch)
            mask = mask_of(batch)
            streams = [unmasked(states.pop(layer), mask) for layer in range(-1, len(layers))]
            tokens += len(streams[0])
            for chunk in zip(*(stream.split(TOKEN_CHUNK) for stream in streams), strict=True):
                # The first's device: layers may lie on several.
                units_SND = normalize(torch.stack([part.to(chunk[0].device).float() for part in chunk]), dim=-1)
                flat = units_SND.flatten(1)
                total_SS += (flat @ flat.T).cpu().double()
    # A matrix product need not be symmetric to the last bit.
    return (total_SS + total_SS.T) / (2 * tokens)


@contextmanager
def _boundaries(layers: nn.ModuleList) -> Iterator[dict[int, Tensor]]:
    """Collects the stream [B, T, D] behind every layer, by its number, and the embeddings as number -1."""
    with layer_outputs(layers, range(len(layers))) as states:

        def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            states[-1] = args[0] if args else kwargs["hidden_states"]

        handle = layers[0].register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield states
        finally:
            handle.remove()
