"""What a user reads when something goes wrong: one sentence, never a traceback."""

import traceback

LONGEST = 400  # characters of a library's own words


class UserError(Exception):
    """Something the user can mend.

    The message is one sentence that names the file, key or model, says what was found and what was
    expected, and what to do. Programs print it without a traceback and exit with status 2.
    """


def reason_of(error: BaseException) -> str:
    """Return what a library's exception says in one line, with what caused it: "TypeError: x (ValueError: y)".

    An exception without words gets its place in the library and the line that failed.
    """
    said, cause = [_words(error)], error.__cause__
    while cause is not None:
        said.append(_words(cause))
        cause = cause.__cause__
    first, *causes = dict.fromkeys(said)
    return f"{first} ({causes[-1]})" if causes else first


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if not text:
        frames = traceback.extract_tb(error.__traceback__)
        text = f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else "no reason given"
    name = type(error).__name__
    return f"{name}: {text if len(text) <= LONGEST else text[: LONGEST - 1] + '…'}"
