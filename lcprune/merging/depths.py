"""How deep a target depth is: so many layers, or a share of those that are there. Standard library only.

layers_left(24, 30) = 24        layers_left("75%", 30) = 23        layers_left("1%", 30) = 1
"""

import re
from fractions import Fraction
from math import floor
from numbers import Integral

from lcprune.errors import InputError


def layers_left(target: int | str, depth: int) -> int:
    """How many layers remain of `depth`.

    Args:
        target: So many; or a share such as "75%", rounded to the nearest whole layer, a half up, and at least one.
        depth: Layers that there are.

    Raises:
        InputError: It is neither.
    """
    if isinstance(target, Integral) and not isinstance(target, bool):
        return int(target)
    share = re.fullmatch(r"\s*(\d{1,2}(?:\.\d{1,9})?)\s*%\s*", target) if isinstance(target, str) else None
    if share is None or not Fraction(share[1]):
        raise InputError(
            f"target_depth={target!r} must be a whole number of layers such as 24, or the share of them that remains, "
            'such as "75%".'
        )
    return max(1, floor(Fraction(share[1]) / 100 * depth + Fraction(1, 2)))
