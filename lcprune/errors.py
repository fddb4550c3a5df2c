"""What a user can get wrong, told apart from what we can get wrong.

Every mistake in a recipe, a file or a command line ends as an `InputError`: one sentence that names the field, the
value received, what is allowed and the way out. The command line prints the sentence and exits with status 2; any
other exception is a defect of ours and keeps its traceback.
"""


class InputError(ValueError):
    """The user's input is wrong; the message is one sentence that says how to mend it."""
