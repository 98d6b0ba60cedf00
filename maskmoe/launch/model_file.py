"""Model files: YAML whose keys are Megatron's flags, as in `launch/models/`."""

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import yaml

from maskmoe.errors import UserError

LAYOUTS = "layouts"
_LEFT_OUT = ("false", "null", "~", "")

Flags = Mapping[str, tuple[str, ...]]
"""Words that follow each flag, by its name without the dashes; a flag that takes no value has none."""


@dataclass(frozen=True)
class ModelFile:
    """What a model file says.

    Attributes:
        path: the file.
        flags: those of every run.
        layouts: further flags by number of ranks.
    """

    path: Path
    flags: Flags
    layouts: Mapping[int, Flags]

    @classmethod
    def read(cls, path: Path, variables: Mapping[str, str]) -> "ModelFile":
        """Read a model file.

        A key is a flag without its dashes. Its value is text, word for word as on a command line; a list gives several
        words. `true` stands for a flag without a value; `false`, `null` and nothing leave the flag out. `${NAME}` in a
        value stands for a variable. The one other key is `layouts`: flags by number of ranks.

        Args:
            path: the file.
            variables: for `${NAME}`.

        Raises:
            UserError: it cannot be read, is no such file, or names a variable that is not set.
        """
        what = f"model file {path}"
        content = read_words(path, "model file")
        if not isinstance(content, dict):
            raise UserError(f"{what} must hold flags and their values, one a line: `num-layers: 12`")
        layouts = parse_layouts(content.pop(LAYOUTS, None) or {}, what, variables)
        return cls(path=path, flags=parse_flags(content, what, variables), layouts=layouts)

    def flags_for(self, ranks: int) -> Flags:
        """The flags of a run of so many ranks: with those of the largest layout that divides it.

        More ranks than the layout has make the data parallel size larger.

        Raises:
            UserError: there are layouts, but none divides the ranks.
        """
        if not self.layouts:
            return self.flags
        fitting = [size for size in self.layouts if ranks % size == 0]
        if not fitting:
            sizes = ", ".join(map(str, sorted(self.layouts)))
            raise UserError(
                f"model file {self.path} has layouts for {sizes} ranks and multiples of them, not for {ranks}"
            )
        return {**self.flags, **self.layouts[max(fitting)]}


def split_flags(words: tuple[str, ...]) -> Flags:
    """Flags of a command line by name; of one that is repeated, the last counts, as for Megatron.

    Raises:
        UserError: the first word is no flag.
    """
    flags: dict[str, tuple[str, ...]] = {}
    name = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags[name] = (value,) if equals else ()
        elif name is None:
            raise UserError(f"after the model file come Megatron's flags, not {word!r}")
        else:
            flags[name] = (*flags[name], word)
    return flags


def override(flags: Flags, others: Flags) -> Flags:
    """Flags with others in place of those of the same name; `--flag false` only takes one away."""
    merged = {**flags, **others}
    return {name: words for name, words in merged.items() if words != ("false",)}


def flag_words(flags: Flags) -> tuple[str, ...]:
    """Flags as a command line has them."""
    return tuple(word for name, values in flags.items() for word in _words(name, values))


def _words(name: str, values: tuple[str, ...]) -> tuple[str, ...]:
    # A value such as `-0.5,1` would be taken for a flag.
    if len(values) == 1 and values[0].startswith("-"):
        return (f"--{name}={values[0]}",)
    return (f"--{name}", *values)


class _WordLoader(yaml.BaseLoader):
    """All scalars are words as they are written: no octal numbers, no `on` that becomes true. Keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key_node, _ in node.value:
            if key_node.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key_node.value} is there twice", node.start_mark)
            keys.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_words(path: Path, kind: str) -> object:
    """Content of a YAML file whose scalars are words as they are written.

    Args:
        path: the file.
        kind: of file, for messages.

    Raises:
        UserError: it cannot be read, or is no YAML.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            return yaml.load(stream, Loader=_WordLoader)
    except OSError as error:
        raise UserError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{kind} {path} is no YAML: {' '.join(str(error).split())}") from error


def parse_flags(content: object, what: str, variables: Mapping[str, str]) -> Flags:
    """Flags from a mapping of words.

    Args:
        content: what was read.
        what: names the file, and the place in it, for messages.
        variables: for `${NAME}`.

    Raises:
        UserError: it is no such mapping, or names a variable that is not set.
    """
    if not isinstance(content, dict):
        raise UserError(f"{what} must hold flags and their values")
    flags = {}
    for name, value in content.items():
        if name.startswith("-"):
            raise UserError(f"{what}: write `{name.lstrip('-')}`, without dashes in front, for {name}")
        words = value if isinstance(value, list) else [value]
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"{what}: {name} must have a value or a list of values")
        if value == "true":
            flags[name] = ()
        elif value not in _LEFT_OUT:
            flags[name] = tuple(_expand(word, name, what, variables) for word in words)
    return MappingProxyType(flags)


def parse_layouts(content: object, what: str, variables: Mapping[str, str]) -> Mapping[int, Flags]:
    """Flags by number of ranks.

    Args:
        content: what was read.
        what: names the file, and the place in it, for messages.
        variables: for `${NAME}`.

    Raises:
        UserError: it is no such mapping, or names a variable that is not set.
    """
    if not isinstance(content, dict):
        raise UserError(f"{what}: `{LAYOUTS}` must hold flags by number of ranks")
    layouts = {
        _number(ranks, what): parse_flags(flags, f"{what}: a layout", variables) for ranks, flags in content.items()
    }
    return MappingProxyType(layouts)


def _expand(word: str, name: str, what: str, variables: Mapping[str, str]) -> str:
    try:
        return string.Template(word).substitute(variables)
    except KeyError as error:
        raise UserError(f"{what}: {name} needs the environment variable {error.args[0]}") from error
    except ValueError as error:
        raise UserError(f"{what}: {name}: write $$ for a dollar sign, or ${{NAME}}") from error


def _number(ranks: str, what: str) -> int:
    if not ranks.isdecimal() or int(ranks) < 1:
        raise UserError(f"{what}: `{LAYOUTS}` holds flags by number of ranks, and {ranks!r} is none")
    return int(ranks)
