"""A recipe as a file, before it is parsed: YAML that is whole, in sections, and says nothing twice.

A key that is there twice is no mistake to YAML, the last one counts; an empty section is no mistake to the parser, its
settings are then gone. Either would be a run with other settings than those that are read in the file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lcprune.errors import InputError

OF_FIT = ("ckpt_path", "weights_only", "verbose", "return_predictions")
"""Keys of a run's own recipe.yaml that belong to Lightning's commands, not to what they make."""
SECTIONS = ("model", "data", "trainer", "collapse")
"""What must hold settings, where it is there."""


def check_all(arguments: Sequence[str]) -> None:
    """Looks at every recipe that a command line names with --config or -c.

    Raises:
        InputError: One is no recipe.
    """
    for name, value in zip(arguments, [*arguments[1:], ""], strict=True):
        given = value if name in ("--config", "-c") else name.partition("=")[2] if name.startswith("--config=") else ""
        if given and _is_file(given):
            check(Path(given))


def check(path: Path) -> None:
    """Raises InputError, with the line, for a file that is not YAML or not a recipe."""
    try:
        text = path.read_text(encoding="utf-8")
        yaml.safe_load(text)  # refuses tags that would make objects of Python's
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        twice = next(_twice(root, set()), None)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise InputError(f"The recipe {path} is not YAML ({error.problem}{line}): correct it.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no date
        reason = str(error).splitlines()[0]
        raise InputError(f"The recipe {path} is not YAML ({reason}): name a text file as in recipes/.") from error
    except OSError as error:
        raise InputError(f"The recipe {path} cannot be read ({error.strerror}): check its rights.") from error
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise InputError(f"The recipe {path} holds no sections: write {', '.join(SECTIONS)} as in recipes/.")
    if twice is not None:
        raise InputError(
            f"The recipe {path} says {twice.value!r} twice in the same place, again in line "
            f"{twice.start_mark.line + 1}, and one would not count: keep one."
        )
    for key, value in root.value:
        if key.tag != "tag:yaml.org,2002:str":
            raise InputError(
                f"The recipe {path} has the key {key.value!r} in line {key.start_mark.line + 1}, which is no name: the "
                f"sections are {', '.join(SECTIONS)}."
            )
        if key.value in SECTIONS and not isinstance(value, yaml.MappingNode):
            raise InputError(
                f"The recipe {path} has no settings under {key.value!r} in line {key.start_mark.line + 1}: write each "
                "on a line of its own, as NAME: VALUE, or leave the section out."
            )


def without_fit(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command that is not Lightning's own, with what a run's recipe.yaml says to those left out.

    Args:
        arguments: With recipes that `check_all` has let through, by --config or -c.
    """
    rest, found = list(arguments), list[str]()
    while rest:
        argument = rest.pop(0)
        if argument in ("--config", "-c") and rest:
            found += [argument, _without_fit(rest.pop(0))]
        elif argument.startswith("--config="):
            found += ["--config", _without_fit(argument.partition("=")[2])]
        else:
            found.append(argument)
    return found


def _without_fit(recipe: str) -> str:
    """A recipe as it was given, by name or as its content, or as content where it has keys of Lightning's commands."""
    try:
        content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8") if _is_file(recipe) else recipe)
    except yaml.YAMLError:
        return recipe  # content that the parser refuses
    if not isinstance(content, dict) or content.keys().isdisjoint(OF_FIT):
        return recipe
    return yaml.safe_dump({key: value for key, value in content.items() if key not in OF_FIT}, sort_keys=False)


def _is_file(name: str) -> bool:
    """Whether it names a file; a recipe may be given as its content, too, which is too long for a name."""
    try:
        return Path(name).is_file()
    except OSError:
        return False


def _twice(node: yaml.Node | None, seen: set[int]) -> Iterator[yaml.Node]:
    """Keys that their mapping has already; what several places share by an anchor is looked at once."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        known: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in known and key.value != "<<":
                yield key
            known.add(key.value if isinstance(key, yaml.ScalarNode) else "")
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            yield from _twice(part, seen)
