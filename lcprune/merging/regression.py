"""Weighted ridge regression of what a projection lacks on what it is fed, from sums that are gathered batch by batch.

    minimise over X   sum_n w_n |e_n - X^T z_n|^2 + lambda |X|^2        X = (Z W Z^T + lambda I)^-1 Z W E^T

Legend: `N` tokens, `I` inputs, `D` outputs. Products of a batch are taken in float32 (or better, if it comes in
better), summed over batches and solved in float64: what a batch loses is 1e-6 of it, and the ridge is 1e-2 and more.
Where the device has no float64 the sums are kept, and solved, on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from lcprune.merging.double import device_of_doubles, total


@dataclass
class Sums:
    """What the regression needs to know of the tokens seen so far."""

    gram_II: Tensor
    """sum of w z z^T."""
    cross_ID: Tensor
    """sum of w z e^T."""
    energy: float
    """sum of w |e|^2: the error as it stands."""

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> "Sums":
        """No tokens seen; the device is that of the tokens to come."""
        device = device_of_doubles(device)
        return cls(
            torch.zeros(inputs, inputs, dtype=torch.float64, device=device),
            torch.zeros(inputs, outputs, dtype=torch.float64, device=device),
            0.0,
        )

    def add(self, z_NI: Tensor, e_ND: Tensor, w_N: Tensor) -> None:
        """Sees more tokens: inputs, what is lacking, weights."""
        precision = torch.promote_types(z_NI.dtype, torch.float32)
        z_NI, e_ND, w_N = z_NI.to(precision), e_ND.to(precision), w_N.to(precision)
        weighted_IN = (z_NI * w_N[:, None]).T
        # Under autocast (a refit during training) the products would be taken in the run's precision.
        with torch.autocast(z_NI.device.type, enabled=False):
            self.gram_II += (weighted_IN @ z_NI).to(self.gram_II.device)
            self.cross_ID += (weighted_IN @ e_ND).to(self.cross_ID.device)
        self.energy += total(w_N * e_ND.square().sum(1))

    def __add__(self, other: "Sums") -> "Sums":
        """Both sets of tokens."""
        return Sums(self.gram_II + other.gram_II, self.cross_ID + other.cross_ID, self.energy + other.energy)

    def error(self, x_ID: Tensor) -> float:
        """Sum of w |e - X^T z|^2."""
        return self.energy + float((x_ID * (self.gram_II @ x_ID - 2 * self.cross_ID)).sum())

    def solve(self, strength: float) -> Tensor:
        """The minimiser X [I, D] for lambda = strength * mean(diag(Z W Z^T)); zero where nothing is to be explained.

        So it is where a sum is no number: then nothing can be.
        """
        scale = float(self.gram_II.diagonal().mean())
        finite = isfinite(scale + self.energy) and bool(self.cross_ID.isfinite().all() & self.gram_II.isfinite().all())
        if scale == 0 or self.energy == 0 or not finite:
            return torch.zeros_like(self.cross_ID)
        ridged_II = self.gram_II.clone()
        ridged_II.diagonal().add_(strength * scale)
        factor, failed = torch.linalg.cholesky_ex(ridged_II)
        if int(failed):  # numerically singular: a strength near zero on few tokens
            return torch.linalg.lstsq(ridged_II, self.cross_ID).solution
        return torch.cholesky_solve(self.cross_ID, factor)


def best_strength(fitted: Sums, held_out: Sums, strengths: Sequence[float]) -> tuple[float, float]:
    """The strength whose solution on `fitted` leaves the least error on `held_out` (the largest of equals), and it."""
    errors = {strength: held_out.error(fitted.solve(strength)) for strength in strengths}
    best = min(sorted(strengths, reverse=True), key=errors.__getitem__)
    return best, errors[best]


def token_weights(target_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Weight [B, T] of every token: min(1, median |h| / |h|) by the lower median of those that count, 0 where masked.

    A few tokens (the first of a sequence above all) carry activations hundreds of times the usual (2402.17762): in a
    sum of squares they would be all that counts. With the squares of these weights they would count as little as any
    other token, although all others attend to them: where the layer that makes the massive activation is gone, the
    refit has to make it anew.
    """
    length_BT = target_BTD.float().norm(dim=-1)
    counted = length_BT if mask_BT is None else length_BT[mask_BT]
    if not len(counted):
        return torch.zeros_like(length_BT)
    weights_BT = (counted.median() / length_BT.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1)
    return weights_BT if mask_BT is None else weights_BT * mask_BT


def held_out_sequences(count: int, fraction: float) -> set[int]:
    """Which of `count` sequences choose the strength: at least one and not all, evenly spread."""
    chosen = min(max(1, round(count * fraction)), count - 1)
    return {int((place + 0.5) * count / chosen) for place in range(chosen)}
