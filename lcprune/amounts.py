"""Amounts as people read them, the same everywhere: 113.3 M parameters, 453.1 MB. Powers of 1000, one decimal.

Memory of devices is not among them: `plan` and the tools beside it count it in GiB.
"""


def count(number: float) -> str:
    """How many there are of something, in the units that --target-params takes.

    Example:
        >>> count(40_256), count(512)
        ('40.3 K', '512')
    """
    return _scaled(number, ("", " K", " M", " B", " T"))


def size(number: float) -> str:
    """A number of bytes, in the units that --target-size takes.

    Example:
        >>> size(453_097_728)
        '453.1 MB'
    """
    return _scaled(number, (" B", " KB", " MB", " GB", " TB"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    if number < 1000:
        return f"{number:.0f}{units[0]}"
    for unit in units[1:-1]:
        number /= 1000
        if round(number, 1) < 1000:
            return f"{number:.1f}{unit}"
    return f"{number / 1000:,.1f}{units[-1]}"
