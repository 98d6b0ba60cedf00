"""The exceptions whose text is shown to users: one line that says what is wrong, where, and what to do."""

import traceback


class UserError(Exception):
    """The user's files or settings are wrong; raised before anything is changed."""


class RunFailure(Exception):  # noqa: N818 - the run fails, not the program: a disk is full, or a loss is NaN
    """A run that started well cannot continue: for example a full disk, a lost file, or a loss of NaN."""


def reason_of(error: Exception) -> str:
    """Return the message of an exception in one line; without a message, as of most assertions, its source line."""
    reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
    return " ".join(reason.split())
