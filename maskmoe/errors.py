"""The exceptions whose text is for people: one clear line that says what is wrong, where, and what to do about it."""


class UserError(Exception):
    """Bad input, found before anything was done: the user's files or settings are at fault, not the program."""


class RunFailure(Exception):
    """A run that was well begun cannot go on: a full disk, a lost file, a loss that is no number."""
