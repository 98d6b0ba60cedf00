"""Small pieces of the sentences that commands and trainings print."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural: `1 rank`, `1,024 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
