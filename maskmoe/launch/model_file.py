"""Reads model files: YAML files whose keys are Megatron's flags, as in `launch/models/`."""

import string
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from maskmoe.arguments import ranges
from maskmoe.arguments.flags import LAYOUTS, OMITTED_VALUES, Flags, override
from maskmoe.errors import UserError
from maskmoe.files.yaml_files import read_words


@dataclass(frozen=True)
class ModelFile:
    """The content of a model file.

    Attributes:
        path: The file.
        flags: The flags of every run.
        layouts: For each number of ranks, the flags that override `flags` for it; the value `false` removes a flag.
    """

    path: Path
    flags: Flags
    layouts: Mapping[int, Flags]

    @classmethod
    def read(cls, path: Path, variables: Mapping[str, str]) -> "ModelFile":
        """Read a model file.

        A key is a flag without its dashes. The value is text, written as on a command line; a list gives several words.
        The value `true` gives the flag without a value. The values `false` and `null`, and an empty value, omit the
        flag; in a layout, they remove a flag of the file. `${NAME}` in a value is replaced by a variable. The value of
        the key `layouts` maps numbers of ranks to further flags. The key `program` names a Python file that every rank
        runs with the arguments `pretrain FLAGS…`, instead of MaskMoE's own entry point.

        Args:
            path: The file.
            variables: The variables for `${NAME}`.

        Raises:
            UserError: The file cannot be read, has another structure, or names a variable that is not set.
        """
        place = f"model file {path}"
        content = read_words(path, "model file")
        if not isinstance(content, dict):
            raise UserError(f"{place} must contain flags and their values, one per line: `num-layers: 12`")
        layouts = parse_layouts(content.pop(LAYOUTS, None) or {}, place, variables)
        return cls(path=path, flags=override({}, parse_flags(content, place, variables)), layouts=layouts)

    def fits(self, ranks: int) -> bool:
        """Return whether the file has a layout for a number of ranks, or no layouts."""
        return not self.layouts or any(ranks % size == 0 for size in self.layouts)

    def flags_for(self, ranks: int) -> Flags:
        """Return the flags of a run, including the layout for its number of ranks.

        The largest layout that divides the number of ranks is chosen. A run on a multiple of the layout's ranks has a
        larger data parallel size.

        Args:
            ranks: The number of ranks of the run.

        Raises:
            UserError: The file has layouts, but none of them divides the number of ranks.
        """
        if not self.fits(ranks):
            sizes = ", ".join(map(str, sorted(self.layouts)))
            raise UserError(
                f"model file {self.path} has layouts for {sizes} ranks and their multiples, not for {ranks}"
            )
        fitting = [size for size in self.layouts if ranks % size == 0]
        return override(self.flags, self.layouts[max(fitting)]) if fitting else self.flags


def parse_flags(content: object, place: str, variables: Mapping[str, str]) -> Flags:
    """Parse the flags in the content of a YAML file; a value that omits its flag becomes `false`, see `override`.

    Args:
        content: A mapping from flags to values, as `read_words` returns it.
        place: The file, and the place in it, for error messages.
        variables: The variables for `${NAME}`.

    Raises:
        UserError: The content has another structure, or names a variable that is not set.
    """
    if not isinstance(content, dict):
        raise UserError(f"{place} must contain flags and their values")
    flags: dict[str, tuple[str, ...]] = {}
    for name, value in content.items():
        words = value if isinstance(value, list) else [value]
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"{place}: {name} must have a value or a list of values")
        if value == "true":
            flags[name] = ()
        elif value in OMITTED_VALUES:
            flags[name] = ("false",)
        else:
            try:
                flags[name] = tuple(string.Template(word).substitute(variables) for word in words)
            except KeyError as error:
                raise UserError(f"{place}: {name} needs the environment variable {error.args[0]}") from error
            except ValueError as error:
                raise UserError(f"{place}: {name}: write $$ for a dollar sign, or ${{NAME}}") from error
    return flags


def parse_layouts(content: object, place: str, variables: Mapping[str, str]) -> Mapping[int, Flags]:
    """Parse the layouts in the content of a YAML file: flags for each number of ranks.

    Args:
        content: A mapping from numbers of ranks to flags, as `read_words` returns it.
        place: The file, and the place in it, for error messages.
        variables: The variables for `${NAME}`.

    Raises:
        UserError: The content has another structure, or names a variable that is not set.
    """
    if not isinstance(content, dict):
        raise UserError(f"{place}: `{LAYOUTS}` must map numbers of ranks to flags")
    layouts: dict[int, Flags] = {}
    for ranks, flags in content.items():
        try:
            number = ranges.RANKS(ranks)
        except ArgumentTypeError as error:
            raise UserError(
                f"{place}: `{LAYOUTS}` maps numbers of ranks to flags, and {ranks[:40]!r} is not a number of ranks"
            ) from error
        layouts[number] = parse_flags(flags, f"{place}: a layout", variables)
    return layouts
