"""Flags of a command line: as words, and as the text of a model file."""

from collections.abc import Mapping, Sequence

import yaml

from maskmoe.errors import UserError

LAYOUTS = "layouts"
"""The key of a model file that holds flags by numbers of ranks."""

OMITTED_VALUES = ("false", "null", "~", "")
"""Values of a model file that omit their flag."""

Flags = Mapping[str, tuple[str, ...]]
"""Maps each flag's name, without dashes, to its values; the values of a flag without a value are `()`."""


def split_flags(words: Sequence[str]) -> Flags:
    """Parse words into flags, of which the last occurrence counts; raise `UserError` if the first is not a flag."""
    flags: dict[str, tuple[str, ...]] = {}
    name = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags[name] = (value,) if equals else ()
        elif name is None:
            raise UserError(f"only Megatron's flags may follow the model file, not {word!r}")
        else:
            flags[name] = (*flags[name], word)
    return flags


def override(flags: Flags, overriding: Flags) -> Flags:
    """Return flags in which the overriding flags replace those with the same name; `--flag false` removes a flag."""
    merged = {**flags, **overriding}
    return {name: words for name, words in merged.items() if words != ("false",)}


def flag_words(flags: Flags) -> tuple[str, ...]:
    """Return flags as the words of a command line."""
    words: list[str] = []
    for name, values in flags.items():
        # argparse would take a value such as `-0.5,1` for a flag, so join it to its flag by an equals sign.
        is_joined = len(values) == 1 and values[0].startswith("-")
        words += [f"--{name}={values[0]}"] if is_joined else [f"--{name}", *values]
    return tuple(words)


def flags_to_yaml(flags: Flags, layouts: Mapping[int, Flags] | None = None) -> str:
    """Return flags and layouts as the text of a model file; a dollar sign in a value must be written as two."""
    content = _yaml_content(flags)
    if layouts:
        content[LAYOUTS] = {ranks: _yaml_content(of_layout) for ranks, of_layout in layouts.items()}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000)


def _yaml_content(flags: Flags) -> dict[str, object]:
    content: dict[str, object] = {}
    for name, values in flags.items():
        is_plain = len(values) == 1 and values[0] not in ("true", *OMITTED_VALUES)
        # A list keeps words that mean something else when they stand alone.
        content[name] = values[0] if is_plain else list(values) or True
    return content
