"""The one exception that means: the user's input is at fault, not the program."""


class UserError(Exception):
    """Bad input. The text is one clear line: what is wrong, where, and what to do about it."""
