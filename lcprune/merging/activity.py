"""What a layer's heads and channels do on text: the statistics by which `Concat` chooses among them.

Legend: `K` KV heads, `I` inputs of the attention's output projection, `F` channels of the MLP.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Activity:
    """Means over all unmasked calibration tokens, of one layer."""

    heads_KI: Tensor
    """[K, I / K] mean absolute input of the attention's output projection, grouped by KV head; float32."""
    channels_F: Tensor
    """[F] mean absolute input of the MLP's down projection; float32."""
