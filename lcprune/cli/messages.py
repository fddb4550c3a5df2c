"""From the long messages of argument parsers and libraries to one sentence that a user can act on."""

import difflib
import re


def one_sentence(message: str) -> str:
    """The part of a parser's message that says what is wrong, on one line.

    Args:
        message: Possibly many lines, with the causes nested inside.
    """
    if match := re.search(r"(?:Key|Group key|Unrecognized arguments|Option) [\"']?([\w.\-]+)[\"']? is not", message):
        return f"{match[1]!r} is not a setting of this recipe: compare `lcprune fit --help`."
    lines = [re.sub(r"\s+", " ", line).strip(" -|") for line in message.splitlines()]
    return ": ".join(line for line in lines if line)[:600]


def did_you_mean(word: str, known: list[str]) -> str:
    """`, did you mean X?` or nothing."""
    near = difflib.get_close_matches(word, known, 1)
    return f", did you mean {near[0]}?" if near else ""
