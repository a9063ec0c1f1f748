"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can mend.

    The message is one sentence that names the file, key or model, says what was found and what was
    expected, and what to do. Programs print it without a traceback and exit with status 2.
    """
