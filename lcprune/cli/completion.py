"""`completion`: a script that makes a shell complete commands, their options, recipes and files.

    lcprune completion bash > ~/.local/share/bash-completion/completions/lcprune
    lcprune completion zsh  >> ~/.zshrc
    lcprune completion fish > ~/.config/fish/completions/lcprune.fish

What can be completed is what `--help` shows: every command's help is asked for once, which takes a few seconds, and
the script itself runs nothing of lcprune.
"""

import io
import re
import shlex
from collections.abc import Iterable
from contextlib import redirect_stdout, suppress
from functools import cache

from lcprune import cli
from lcprune.cli import recipes
from lcprune.cli.arguments import CommandParser

EXAMPLES = """examples:
  lcprune completion bash > ~/.local/share/bash-completion/completions/lcprune
  lcprune completion zsh >> ~/.zshrc
  lcprune completion fish > ~/.config/fish/completions/lcprune.fish
  source <(lcprune completion bash)                   # in this shell only
"""
BASH = """\
_lcprune() {{
    local IFS=$'\\n' current=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} words=
    if [ "$COMP_CWORD" = 1 ]; then words={commands}
    elif [ "$command" = recipes ] && [ "$COMP_CWORD" = 2 ]; then words=$'list\\ncopy'
    elif [ "$command" = recipes ] && [ "$COMP_CWORD" = 3 ]; then words={recipes}
    elif [ "$command" = completion ]; then words=$'bash\\nzsh\\nfish'
    else case $current in -*) case $command in
{cases}
    esac;; esac; fi
    if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$current"))
    else compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$current")); fi
}}
complete -F _lcprune lcprune
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + BASH
FISH = """\
complete -c lcprune -n __fish_use_subcommand -f -a {commands}
complete -c lcprune -n '__fish_seen_subcommand_from recipes' -f -a {recipes}
complete -c lcprune -n '__fish_seen_subcommand_from completion' -f -a 'bash zsh fish'
{cases}
"""
SHELLS = ("bash", "zsh", "fish")


def run(command: str, arguments: list[str]) -> None:
    """`lcprune completion SHELL`."""
    description = "Prints a script that makes a shell complete lcprune's commands, options, recipes and files."
    parser = CommandParser(command, description, EXAMPLES)
    parser.add_argument("shell", choices=SHELLS, help="which shell")
    print(script(parser.parse_args(arguments).shell), end="")


def commands() -> list[str]:
    """Every command there is."""
    return list(cli.HOMES)


@cache
def options(command: str) -> list[str]:
    """Every option that the help of a command shows; of one that takes a recipe, the recipe's settings too."""
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        cli.main([command, "--help"])
    found = re.findall(r"(?<![\w.-])--[A-Za-z][\w.-]*\w", shown.getvalue().partition("examples:")[0])
    takes_recipe = "--config" in found and command not in cli.TRAINING
    return sorted({*found, *(options("fit") if takes_recipe else ())})


def script(shell: str) -> str:
    """What a shell has to read.

    Args:
        shell: One of `SHELLS`.
    """
    by_command = {command: options(command) for command in commands()}
    if shell == "fish":
        cases = [
            f"complete -c lcprune -n '__fish_seen_subcommand_from {command}' -a {_words(found, ' ')}"
            for command, found in by_command.items()
            if found
        ]
        separator, template = " ", FISH
    else:
        cases = [f"    {command}) words={_words(found)};;" for command, found in by_command.items() if found]
        separator, template = "\n", ZSH if shell == "zsh" else BASH
    return template.format(
        commands=_words(by_command, separator), recipes=_words(recipes.known(), separator), cases="\n".join(cases)
    )


def _words(words: Iterable[str], separator: str = "\n") -> str:
    return shlex.quote(separator.join(words))
