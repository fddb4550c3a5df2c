"""The parser of a command's own options."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import NoReturn

from lcprune.errors import InputError


class CommandParser(ArgumentParser):
    """argparse's, whose mistakes are one sentence with the way to the help."""

    def __init__(self, command: str, description: str, examples: str, usage: str | None = None) -> None:
        """Without options yet.

        Args:
            command: Its name.
            description: What it does.
            examples: What --help ends with, printed as it stands.
            usage: The command as a user types it; None = made of the options.
        """
        super().__init__(
            prog=f"lcprune {command}",
            usage=usage,
            description=description,
            epilog=examples,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        way = " see" if message.endswith("?") else ": see"
        raise InputError(f"{self.prog.removeprefix('lcprune ')}: {message}{way} `{self.prog} --help`.")
