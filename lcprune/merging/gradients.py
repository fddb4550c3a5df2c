"""How safe it is to lose a layer, by its weights and what they do to the loss: **lower = safer to merge**.

    Magnitude   sum over matrices W of sum_ij |W_ij|^p
    Taylor      sum over matrices W of sum_ij |W_ij * dL/dW_ij|        L = next-token loss of all calibration text

Both from Shortened LLaMA (arXiv:2402.02834, section 3.1), which also spares the first 4 and the last 2 layers: that is
`OneShotRanking(spare_first=4, spare_last=2)`. Matrices are the weights of the linear projections, stacks of experts
among them; norms and biases do not count.

The loss's gradient is walked from the head down to the first layer, all batches before the next layer: a layer is run
again from its input, which hands back the gradient of that input and of the layer's weights. So the gradient of one
layer exists at a time, summed over all text in float32 before its absolute value is taken; no Parameter ever sees
one. Memory beside it: what `prefixes_of` keeps. Legend: `B` batch, `T` tokens, `N` scored
tokens of a batch, `D` hidden.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import HEAD_CHUNK, Batch, Calibration, evaluating, logits, next_tokens, stream_of
from lcprune.merging.criteria import Criterion
from lcprune.merging.double import total
from lcprune.merging.prefix import prefixes_of
from lcprune.merging.progress import track


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Sum of the absolute weights of a layer's projections (Shortened LLaMA); reads no text."""

    power: float = 1.0
    """Power of every absolute weight: 1 ranks layers by their L1 norm, 2 by their L2 norm."""

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise InputError(f"power={self.power} of Magnitude must be above 0: 1 for absolute values, 2 for squares.")

    def score(self, calibration: Calibration) -> tuple[float, ...]:
        """Sum of |theta| ** power per layer, in float64."""
        layers = map(calibration.layer_tensors, track(range(calibration.depth), "weighing layers"))
        return tuple(sum(self._of(theta) for theta in layer.values() if theta.dim() > 1) for layer in layers)

    def _of(self, matrix: Tensor) -> float:
        return total(matrix.float().abs().pow(self.power))


@dataclass(frozen=True)
class Taylor(Criterion):
    """How much the loss would change, to first order, without each of a layer's weights (Shortened LLaMA)."""

    def score(self, calibration: Calibration) -> tuple[float, ...]:
        """Sum of |theta * dL/dtheta| per layer; L is the mean next-token loss over the calibration tokens."""
        model, depth = calibration.model, calibration.depth
        layers = calibration.layout.layers_of(model)
        scores = [0.0] * depth
        with _differentiable(model):
            prefixes = prefixes_of(calibration, depth - 1)
            tokens, gradients = 0, []
            for batch, (state_BTD, arguments) in zip(calibration.batches, prefixes.before(depth - 1), strict=True):
                with torch.no_grad():
                    output_BTD = stream_of(layers[-1](state_BTD, **arguments))
                gradient_BTD, count = _loss_gradient(model, output_BTD, batch)
                gradients.append(gradient_BTD)
                tokens += count
            for index in track(range(depth - 1, -1, -1), "scoring layers"):
                matrices = _matrices(layers[index])
                sums = {name: torch.zeros_like(matrix, dtype=torch.float32) for name, matrix in matrices.items()}
                for place, (state_BTD, arguments) in enumerate(prefixes.before(index)):
                    gradients[place] = _backward(layers[index], state_BTD, arguments, gradients[place], sums)
                prefixes.forget_from(index)
                products = [(matrix.float() * sums[name]).abs() for name, matrix in matrices.items()]
                scores[index] = sum(map(total, products)) / max(tokens, 1)
        return tuple(scores)


def _matrices(layer: nn.Module) -> dict[str, Tensor]:
    """The weights of a layer's projections by name, cut from any graph."""
    return {name: parameter.detach() for name, parameter in layer.named_parameters() if parameter.dim() > 1}


@contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode with gradients, whatever the caller has switched off."""
    # enable_grad does not end an inference_mode, whose tensors take no part in a backward pass.
    with torch.inference_mode(False), evaluating(model), torch.enable_grad():
        yield


def _backward(
    layer: nn.Module, state_BTD: Tensor, arguments: Mapping[str, object], gradient_BTD: Tensor, sums: dict[str, Tensor]
) -> Tensor:
    """Runs one layer again on one batch.

    Args:
        layer: A decoder layer.
        state_BTD: Its input.
        arguments: What else it is called with.
        gradient_BTD: The loss's gradient by the layer's output.
        sums: The gradients by the layer's matrices are added to these.

    Returns:
        The loss's gradient by the layer's input, [B, T, D].
    """
    # Stand-ins for the Parameters, so that their requires_grad and grad are nobody's concern.
    leaves = {name: matrix.requires_grad_() for name, matrix in _matrices(layer).items()}
    state_BTD = state_BTD.detach().requires_grad_()
    output_BTD = stream_of(functional_call(layer, leaves, (state_BTD,), dict(arguments)))
    # Experts that no token was sent to take no part.
    first, *others = torch.autograd.grad(
        output_BTD, (state_BTD, *leaves.values()), gradient_BTD, allow_unused=True, materialize_grads=True
    )
    for name, gradient in zip(leaves, others, strict=True):
        sums[name] += gradient
    return first


def _loss_gradient(model: PreTrainedModel, state_BTD: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Gradient [B, T, D] of the summed next-token loss by the last layer's output, and over how many tokens it sums.

    Logits exist for `HEAD_CHUNK` tokens at a time.
    """
    norm = model.get_submodule(layout_of(model.config).final_norm)
    state_BTD = state_BTD.detach().requires_grad_()
    last_BTD = norm(state_BTD)
    targets_BT = next_tokens(batch)[:, :-1].to(last_BTD.device)
    keep_BT = targets_BT != -100
    states_ND, targets_N = last_BTD[:, :-1][keep_BT].detach(), targets_BT[keep_BT]
    pieces = []
    for states, targets in zip(states_ND.split(HEAD_CHUNK), targets_N.split(HEAD_CHUNK), strict=True):
        leaf = states.requires_grad_()
        loss = cross_entropy(logits(model, leaf).float(), targets, reduction="sum")
        pieces.append(torch.autograd.grad(loss, leaf)[0])
    gradient_BTD = torch.zeros_like(last_BTD)
    gradient_BTD[:, :-1][keep_BT] = torch.cat(pieces).to(gradient_BTD.dtype)
    return torch.autograd.grad(last_BTD, state_BTD, gradient_BTD)[0], len(targets_N)
