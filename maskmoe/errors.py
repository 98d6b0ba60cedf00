"""The exceptions whose text is shown to users: one line that says what is wrong, where, and what to do."""


class UserError(Exception):
    """The user's files or settings are wrong; raised before anything is changed."""


class RunFailure(Exception):  # noqa: N818 - the run fails, not the program: a disk is full, or a loss is NaN
    """A run that started well cannot continue: for example a full disk, a lost file, or a loss of NaN."""
