"""The regression of one output projection: gathered batch by batch, then written into its weights.

Legend: `B` batch, `T` tokens, `N` tokens of all sequences, `I` inputs of a projection, `D` hidden.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from lcprune.merging.architectures import Branch, layout_of
from lcprune.merging.double import in_double, total
from lcprune.merging.families import residual_scale
from lcprune.merging.observation import Written
from lcprune.merging.regression import Sums, best_strength, held_out_sequences, token_weights
from lcprune.merging.streams import Stream

SMALLEST_GAIN = 0.01
"""Where a norm follows a projection, outputs whose gain is below this fraction of the largest are left alone."""


class ProjectionFit:
    """The regression of one output projection, gathered batch by batch, then written into its weights."""

    def __init__(
        self, layer: nn.Module, branch: Branch, student: Stream, strengths: Sequence[float], held_out: float
    ) -> None:
        """No batch seen.

        Args:
            layer: A layer of the student.
            branch: Its attention or MLP.
            student: The student's stream; batches are numbered as there.
            strengths: Candidates for lambda in units of the mean of diag(Z Z^T).
            held_out: Fraction of the sequences that chooses among them.
        """
        layout = layout_of(student.model.config)
        self._strengths, self._student, self._transposed = strengths, student, layout.transposed
        self._scale = residual_scale(student.model.config)
        self._projection = layer.get_submodule(branch.consumer)
        self._gain_D: Tensor | None = None
        if branch.norm_after:
            norm = layer.get_submodule(branch.norm_after)
            assert isinstance(norm.weight, Tensor)
            self._gain_D = norm.weight.detach().float() + layout.norm_offset
        inputs = self._weight_DI.shape[1] + (self._bias is not None)
        shape = (inputs, self._weight_DI.shape[0], self._weight_DI.device)
        self._fitted, self._held_out = Sums.zeros(*shape), Sums.zeros(*shape)
        firsts = [0, *accumulate(len(state) for state in student.states)]
        self._firsts, held = firsts, held_out_sequences(firsts[-1], held_out)
        self._held = held if len(strengths) > 1 else set()

    @property
    def _weight_DI(self) -> Tensor:
        weight = self._projection.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if self._transposed else weight.detach()

    @property
    def _bias(self) -> Tensor | None:
        bias = self._projection.bias
        assert bias is None or isinstance(bias, Tensor)
        return None if bias is None else bias.detach()

    def see(self, index: int, written: Written, target_BTD: Tensor, reached_BTD: Tensor) -> None:
        """Takes in batch `index`: what the projection was fed, where the stream should be, where it is."""
        z_BTI, (e_BTD, w_BT) = written.inputs_BTI, self._lacking(index, written, target_BTD, reached_BTD)
        if self._bias is not None:
            z_BTI = torch.cat([z_BTI, torch.ones_like(z_BTI[..., :1])], -1)
        held = torch.tensor([self._firsts[index] + place in self._held for place in range(len(z_BTI))])
        for sums, rows in ((self._fitted, ~held), (self._held_out, held)):
            if rows.any():
                rows = rows.to(z_BTI.device)
                sums.add(z_BTI[rows].flatten(0, 1), e_BTD[rows].flatten(0, 1), w_BT[rows].flatten())

    def error(self, index: int, written: Written, target_BTD: Tensor, reached_BTD: Tensor) -> float:
        """The error of batch `index` as it stands; takes nothing in."""
        e_BTD, w_BT = self._lacking(index, written, target_BTD, reached_BTD)
        return total(w_BT * e_BTD.square().sum(-1))

    def _lacking(self, index: int, written: Written, target_BTD: Tensor, reached_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """What the projection would have to add [B, T, D], and the weight of every token [B, T]."""
        e_BTD = (target_BTD.float() - reached_BTD.float()) / self._scale
        w_BT = token_weights(target_BTD, self._student.masks[index])
        if written.before_norm_BTD is not None and self._gain_D is not None:
            # Behind a norm: what the projection itself would have to add while the norm's divisor stays.
            divisor_BT1 = written.before_norm_BTD.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
            loud_D = self._gain_D.abs() > SMALLEST_GAIN * self._gain_D.abs().max()
            e_BTD = torch.where(loud_D, e_BTD * divisor_BT1 / self._gain_D, 0.0)
            w_BT = w_BT / divisor_BT1.squeeze(-1).square()
        return e_BTD, w_BT

    def solve(self) -> None:
        """Writes the better weights, unless the error would not fall, on all tokens or on the held-out ones."""
        everything, strength = self._fitted + self._held_out, self._strengths[0]
        if self._held:
            strength, error = best_strength(self._fitted, self._held_out, self._strengths)
            if not error < self._held_out.energy:
                return
        change_ID = everything.solve(strength)
        old_DI, bias_D = self._weight_DI, self._bias
        inputs = old_DI.shape[1]
        new_DI = (in_double(old_DI) + change_ID[:inputs].T).to(old_DI.dtype)
        change_ID[:inputs] = (in_double(new_DI) - in_double(old_DI)).T
        if bias_D is not None:
            new_D = (in_double(bias_D) + change_ID[-1]).to(bias_D.dtype)
            change_ID[-1] = in_double(new_D) - in_double(bias_D)
        # Rounded to the stored dtype, a small change may be none or even do harm.
        if not everything.error(change_ID) < everything.energy:
            return
        self._projection.weight.data = (new_DI.T if self._transposed else new_DI).contiguous().to(old_DI.device)
        if bias_D is not None:
            self._projection.bias.data = new_D.to(old_DI.device)
