"""From the long messages of argument parsers and libraries to one sentence that a user can act on."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

import lcprune
from lcprune import files
from lcprune.cli import named, recipes
from lcprune.errors import InputError

_UNKNOWN = re.compile(r"(?:[Oo]ption '([\w.\-]+)'|unrecognized arguments: --([\w.\-]+))")
_AMBIGUOUS = re.compile(r"ambiguous option: --([\w.\-]+)")
_NO_FILE = re.compile(r"Parser key \"([\w.]+)\":\s*(?:Problem with given path: )?.*File does not exist: '?([^'\n]+)'?")
_INTERVAL = re.compile(r"`val_check_interval` \((\d+)\) must be less than or equal to .* batches \((\d+)\)")
_NO_CLASS = re.compile(
    r"(?:Expected a dot import path string:\s*|Import path (?!does not)|Unexpected import path format: )'?([\w.\-]*)"
    r"|Expected '([\w.\-]+)' to be a|Subclasses are disabled for \w+, thus '([\w.\-]+)'"
)
_NO_CLASS_UNNAMED = re.compile(
    r"Import path does not correspond|expects a function or a callable class|Not a valid subclass of"
)
_ABSTRACT = re.compile(r"Expected an instantiatable class, but ?([\w.]*) is abstract")
_NOTHING = re.compile(r"Not a valid subclass of (\w+)\n(?s:.*)Given value: \{\}")
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$")


_ADVICE = ("Subclass types expect one of", "a class path (str)", "a dict with", "a dict without")
ALIKE = 1.2
"""From here on one setting may have been meant by the other; at most 2."""
LONGEST = 100
"""Characters of a value that a sentence repeats."""


class ParseError(InputError):
    """What a parser has found, without the settings that lead to the class it reads."""


def key_of(message: str) -> str:
    """The setting that a parser's message is about; empty if it says none."""
    return next(iter(re.findall(r'Parser key "([\w.]+)"', message)), "")


def one_sentence(message: str, settings: Iterable[str] = ()) -> str:
    """The part of a parser's message that says what is wrong, on one line.

    Args:
        message: Of jsonargparse: possibly many lines, with the causes nested inside.
        settings: All settings there are, to guess what a misspelt one was meant to be.
    """
    if match := _AMBIGUOUS.search(message):
        return _unknown_setting(match[1], settings)
    if match := _NO_FILE.search(message):
        looked_for = recipes.not_there if match[1] == "config" else files.not_there
        return f"{match[1]}={match[2]} {looked_for(Path(match[2]))}."
    if match := _UNKNOWN.search(message):
        return _unknown_setting(match[1] or match[2], settings)
    key = key_of(message)
    causes = _causes(message)
    given = next((match[2] for cause in causes if (match := _EXPECTED.search(cause)) and match[2]), None)
    given = given or next(iter(re.findall(r"(?:Given|Got) value: (.*)", message)), None)
    if (match := _ABSTRACT.search(message) or _NOTHING.search(message)) and (
        sentence := named.nameless(key, match[1] or str(given))
    ):
        return sentence
    expected = [plain(match[1]) for cause in causes if (match := _EXPECTED.search(cause))]
    expected = [kind for kind in dict.fromkeys(expected) if kind != "NoneType"]
    numbers = [kind for kind in expected if kind in ("a number", "a whole number")]
    name = _no_class(message, causes, given)
    if name is not None and numbers and "." not in name:
        return f"{key}={_shortened(name)} must be {' or '.join(numbers)}."
    if name is not None:
        near = _did_you_mean(name.rpartition(".")[2], [name for name in lcprune.__all__ if name[0].isupper()])
        return f"{key}: {name!r} is not a class that fits here{near} (a name of lcprune's, or package.Class)."
    if key and expected and len(expected) == len({cause for cause in causes if "NoneType" not in cause}):
        return f"{key}={_shortened(str(given))} must be {' or '.join(expected)}."
    reasons = [cause for cause in causes if "NoneType" not in cause]
    return (f"{key}: " if key else "") + one_line("; ".join(reasons)[:500]) + "."


def too_seldom(error: ValueError) -> InputError | None:
    """Lightning's refusal of an interval longer than an epoch, with the way out; None = it is another error."""
    if (match := _INTERVAL.search(str(error))) is None:
        return None
    return InputError(
        f"trainer.val_check_interval={match[1]} is more than the {match[2]} batches of an epoch: lower it, or set "
        "trainer.check_val_every_n_epoch to null, and it counts batches through all epochs."
    )


def cause_of(error: BaseException | None) -> InputError | None:
    """The InputError among an exception and its causes: a parser wraps what a recipe's classes raise."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def _no_class(message: str, causes: Iterable[str], given: str | None) -> str | None:
    """What was given for a class and is none of the right kind."""
    for cause in causes:
        if match := _NO_CLASS.search(cause):
            return next((name for name in match.groups() if name), "")
    return _shortened(given) if given and _NO_CLASS_UNNAMED.search(message) else None


def one_line(message: object) -> str:
    """A library's own words as one sentence, without a full stop."""
    return " ".join(str(message).split()).rstrip(".").replace(". ", "; ")


def _unknown_setting(name: str, settings: Iterable[str]) -> str:
    known = sorted(setting for setting in settings if not setting.endswith(".help"))
    name = _shortened(name)
    first = name.partition(".")[0]
    if first not in (groups := {setting.partition(".")[0] for setting in known}):
        return f"{first!r} is not a setting{_did_you_mean(first, list(groups)) or ':'} compare `lcprune fit --help`."
    parts = name.split(".")
    heads = (".".join(parts[:number]) for number in range(2, len(parts) + 1))
    wrong = next((head for head in heads if not any(f"{setting}.".startswith(f"{head}.") for setting in known)), name)

    def alike(setting: str) -> float:
        return max(_likeness(name, setting), _likeness(wrong, setting))

    near = max((setting for setting in known if setting.partition(".")[0] == first), key=alike)
    if alike(near) < ALIKE:  # what belongs to another section, perhaps
        near = max(known, key=alike)
    guess = f", did you mean {near}?" if alike(near) >= ALIKE else ":"
    return f"{name!r} is not a setting{guess} compare `lcprune fit --help`."


def _likeness(name: str, setting: str) -> float:
    """0 to 2: of two dotted names, and of their last parts, which people remember best."""
    lasts = name.rpartition(".")[2], setting.rpartition(".")[2]
    return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in ((name, setting), lasts))


def fields_within(hint: object) -> set[str]:
    """The settings of lcprune's classes that a type allows, those of subclasses among them."""
    found = {name for part in get_args(hint) for name in fields_within(part)}
    if isinstance(hint, type) and hint.__module__.partition(".")[0] == lcprune.__name__:
        found |= {field.name for field in fields(hint)} if is_dataclass(hint) else set()
        subclasses: list[type] = hint.__subclasses__()
        found |= {name for kind in subclasses for name in fields_within(kind)}
    return found


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f", did you mean {near[0]}?" if near else ""


def _causes(message: str) -> list[str]:
    """The innermost lines: without the key, the list of subtypes and the given value."""
    skipped = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but", *_ADVICE)
    lines = [
        re.sub(r"\s+", " ", line).strip(" -") for line in re.sub(r'Parser key "[\w.]+":', "", message).splitlines()
    ]
    lines = [re.sub(r"^Type .* expects a function or a callable class: ", "", line) for line in lines]
    lines = [re.sub(r"^Not of type Path: .*", "Expected a <class 'pathlib.Path'>", line) for line in lines]
    lines = [line.partition(". Got value: Namespace(")[0] for line in lines]
    return [line for line in lines if line and not line.startswith(skipped)]


def plain(kind: str) -> str:
    """A type as a user would write it: `typing.Literal['all', 'layers']` -> one of all, layers."""
    if match := re.match(r"typing\.Literal\[(.*)\]", kind):
        return "one of " + match[1].replace("'", "")
    if match := re.match(r"<class '(?:\w+\.)*(\w+)'>", kind):
        names = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "Path": "a path"}
        return names.get(match[1], match[1])
    return kind


def unmade(message: str) -> str | None:
    """Jsonargparse's report of a class that does not take its settings, in one sentence; None = it is another report.

    Args:
        message: With a line such as `Given value: Namespace(class_path='lcprune.Evenly', init_args=Namespace(...))`.
    """
    given = re.search(r"class_path='([\w.]+)', init_args=Namespace\(([^\n]*)\)\)", message)
    if given is None:
        return None
    return (
        f"{given[1].rpartition('.')[2]} cannot be made with {given[2]}: give each of these a value of its kind, or "
        "leave it out for its default."
    )
