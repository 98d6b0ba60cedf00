"""Reads YAML files whose values are words of a command line: model files and suites."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from maskmoe.errors import UserError
from maskmoe.files.untrusted import UnusableFile, read_bounded

_MAX_BYTES = 256 << 10  # parsing takes about 10 s for each MiB


class _WordLoader(yaml.BaseLoader):
    """Loads all scalars as text, without octal numbers or `on` that becomes true, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if repeated := [name for name, count in names.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated[0]} is repeated", node.start_mark)
        return super().construct_mapping(node, deep)


def read_words(path: Path, kind: str) -> object:
    """Read a YAML file with all scalars as text. Raises UserError, which calls the file a `kind`: "model file"."""
    try:
        return yaml.load(read_bounded(path, _MAX_BYTES).decode(), Loader=_WordLoader)
    except UnusableFile as error:
        raise UserError(f"the {kind} {path} {error.reason}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        hint = "; write quotes around a value that begins with *" if "alias" in reason else ""
        raise UserError(f"{kind} {path} is not valid YAML: {reason}{hint}") from error
