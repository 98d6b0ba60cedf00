"""Replaces attributes of Megatron-Core and torch."""


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
