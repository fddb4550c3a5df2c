"""What a user can get wrong, told apart from what the machine prevents and from what we get wrong.

Every mistake in a recipe, a file or a command line ends as an `InputError`: one sentence that names the field, the
value received, what is allowed and the way out; the command line exits with status 2. What the machine or the course
of the run prevents (a full disk, a diverged loss) is a `RunError`, one sentence too, status 1. Any other exception is
a defect of ours and keeps its traceback.
"""


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or else its kind, to stand within a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ").replace(". ", ", ")


class InputError(ValueError):
    """The user's input is wrong; the message is one sentence that says how to mend it."""


class RunError(RuntimeError):
    """The work cannot be finished, through no mistake in the input; the message is one sentence."""


class Stopped(Exception):
    """A signal ended the work where it can go on; the message says how, the exit status is 128 + the signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class DiskError(RunError, OSError):
    """Nothing can be written where it should be; what was there is as it was."""
