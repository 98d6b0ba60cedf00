"""Replaces attributes of Megatron-Core and torch."""

from collections.abc import Iterator
from contextlib import contextmanager


def replace(owner: object, name: str, replacement: object) -> None:
    """Set an attribute of a module or class that exists already.

    Args:
        owner: The module or class.
        name: Name of the attribute.
        replacement: The new value. Its type may differ from the declared type of the attribute.

    Raises:
        AttributeError: There is nothing to replace, so another version of Megatron-Core or torch is installed than the
            patch was written for.
    """
    getattr(owner, name)
    setattr(owner, name, replacement)


@contextmanager
def replacing(owner: object, **replacements: object) -> Iterator[None]:
    """Replace attributes of a module or class during a block, see `replace`.

    Args:
        owner: The module or class.
        replacements: The new values by name of the attribute.
    """
    stock = {name: getattr(owner, name) for name in replacements}
    for name, replacement in replacements.items():
        replace(owner, name, replacement)
    try:
        yield
    finally:
        for name, value in stock.items():
            setattr(owner, name, value)
