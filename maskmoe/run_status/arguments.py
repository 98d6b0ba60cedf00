"""Reads the arguments of the newest start of a run from `args.yaml` in its run folder."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from maskmoe.files.run_folder import ARGUMENTS
from maskmoe.files.untrusted import UnusableFile, read_bounded

_MOST_BYTES = 1 << 20
_FOLDER = re.compile(r"# Relative paths are relative to (.+)")
_ARGUMENT = re.compile(r"# (\w+): (.*)")
_MOST_DIGITS = 15


@dataclass(frozen=True)
class RunArguments:
    """The arguments of a run.

    Attributes:
        texts: all arguments of Megatron and MaskMoE by name, as text; empty if the run has written none.
        folder: the folder in which the run was started, to which paths are relative.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()

    @classmethod
    def read(cls, run: Path) -> "RunArguments":
        """Return the arguments of the newest start of a run.

        Args:
            run: the run folder.
        """
        try:
            lines = read_bounded(run / ARGUMENTS, _MOST_BYTES).decode(errors="replace").splitlines()
        except UnusableFile:
            return cls()
        folder = next((match[1] for line in lines if (match := _FOLDER.fullmatch(line))), "")
        return cls({match[1]: match[2] for line in lines if (match := _ARGUMENT.fullmatch(line))}, Path(folder))

    def get(self, name: str) -> str | None:
        """Return an argument as text; None if the argument is unknown or None."""
        text = self.texts.get(name, "None")
        return None if text == "None" else text

    def number(self, name: str) -> int | None:
        """Return an argument that is a whole number; None if the argument is unknown or anything else."""
        text = self.texts.get(name, "")
        return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else None

    def path(self, name: str) -> Path | None:
        """Return an argument that is a path; None if the argument is unknown or None."""
        text = self.get(name)
        return None if text is None else self.folder / text
