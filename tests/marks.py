"""What a parametrized test leaves to the slow tests."""

import pytest


def slow(*cases: object) -> list[object]:
    """Cases that only the slow tests run, where the fast ones already have one of each kind.

    Args:
        cases: Values; a tuple holds those of several arguments, as for `pytest.mark.parametrize`.
    """
    return [
        pytest.param(*case, marks=pytest.mark.slow)
        if isinstance(case, tuple)
        else pytest.param(case, marks=pytest.mark.slow)
        for case in cases
    ]
