"""The command line: `lcprune COMMAND ...` and `lightning COMMAND ...`.

Only a dispatcher: it imports nothing heavy, so that `--help` answers at once, and a command imports what it needs.
Exit status: 0 done, 1 the machine's fault (disk, memory), 2 the user's mistake (one sentence on stderr), 130 stopped
by the user, 143 by SIGTERM. A defect of ours keeps its traceback.
"""

import errno
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from types import FrameType

from lcprune import __version__
from lcprune.errors import InputError, RunError, Stopped

HELP = f"""lcprune {__version__}: a causal LM 20-50 % shorter, taught by the original

usage: lcprune COMMAND [--config RECIPE.yaml ...] [--help]

with training (Lightning's own commands):
  fit        merges layers while the student trains, then exports it
  validate   measures perplexity and agreement with the teacher on the validation text
  test       the same on a data module's test text (ours: the held-out text), logged as test/...
  predict    lets the student continue held-out text; writes predictions.jsonl

before training:
  plan       shows what a recipe would do: depth, parameters, memory, work; nothing is loaded
  data       shows which tokens of the recipe's text are learned, in colour, and how many
  score      scores every layer by every criterion
  cache      stores what the teacher says about the training text, once; fit then looks it up

without training:
  collapse   plans, merges, exports; --plan-only prints the plan, --plan FILE executes an edited one
  collapse-checkpoint
             merges layers in a checkpoint, between two runs of fit that cannot merge themselves

after training:
  evaluate   measures a model beside its teacher: tasks, text, agreement, repetition, speed, memory
  report     shows one run or several in one HTML file: family tree, curves, similarities, generated text
  export     turns a checkpoint into a Hugging Face folder; --push-to-hub, --gguf

besides:
  recipes    lists the recipes that come with lcprune; recipes copy NAME copies one
  completion prints a script that lets your shell complete all of this

start here:
  lcprune fit --config recipes/quickstart.yaml
  lcprune COMMAND --help
"""

TRAINING = ("fit", "validate", "test", "predict")
HOMES = dict.fromkeys(TRAINING, "training") | {
    "plan": "planning",
    "data": "previewing",
    "score": "scoring",
    "cache": "caching",
    "collapse": "merging",
    "collapse-checkpoint": "surgery",
    "evaluate": "evaluating",
    "report": "reporting",
    "export": "delivery",
    "recipes": "recipes",
    "completion": "completion",
}
"""Every command -> the module here whose `run` it is, imported only then."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; default: those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"lcprune {__version__}")
        return 0
    try:
        _run(arguments[0], arguments[1:])
        return 0
    except InputError as error:
        return _say(error, 2)
    except KeyboardInterrupt:
        return _say("stopped", 130)
    except RunError as error:
        return _say(error, 1)
    except Stopped as error:
        return _say(error, error.status)
    except (MemoryError, RuntimeError) as error:
        from lcprune.cli.failures import sentence

        if (said := sentence(error)) is None:
            raise
        return _say(said, 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return _say(f"{error.strerror} ({error.filename}): make room, or write somewhere else.", 1)


def lightning_main() -> int:
    """The command `lightning`: Lightning's subcommands are ours, any other goes to lightning_sdk's own command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in (*TRAINING, "-h", "--help"):
        return main(arguments)
    try:
        from lightning_sdk.cli.entrypoint import main_cli
    except ImportError:
        return _say(
            f"lightning {arguments[0]}: not one of {', '.join(TRAINING)}, and lightning_sdk, "
            "which has other commands, is not installed.",
            2,
        )
    main_cli()
    return 0


def _run(command: str, arguments: list[str]) -> None:
    if command not in HOMES:
        near = get_close_matches(command, HOMES, 1)
        raise InputError(
            f"{command!r} is not a command{f', did you mean {near[0]}?' if near else ';'} "
            f"the commands are {', '.join(HOMES)}."
        )
    run = import_module(f"lcprune.cli.{HOMES[command]}").run
    if command in TRAINING:  # which ends between two steps, with a checkpoint
        run(command, arguments)
        return
    try:
        with _terminable():
            run(command, arguments)
    except _Terminated as stop:
        raise Stopped("stopped by SIGTERM: run the command again.", 128 + signal.SIGTERM) from stop


class _Terminated(BaseException):
    """SIGTERM; no library takes it for an error that it knows."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM unwind what is being done, so that what is half written goes."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough: a second one must not break off the tidying up
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _say(message: object, status: int) -> int:
    from rich.console import Console
    from rich.text import Text

    # Colour on a terminal only, and not where NO_COLOR is set: rich looks.
    Console(stderr=True).print(Text.assemble(("lcprune:", "bold red"), f" {message}"), soft_wrap=True)
    return status
