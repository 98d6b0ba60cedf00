"""The command line of torchrun."""

import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command line with its environment variables.

    Attributes:
        words: the program and its arguments.
        environment: variables that are set in addition to those of this process.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """Return one line that can be pasted into a shell."""
        variables = (f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return " ".join([*variables, shlex.join(self.words)])


def torchrun_words(options: Iterable[str], module: str, arguments: Iterable[str]) -> tuple[str, ...]:
    """Return the words that run a module as ranks under torchrun.

    Args:
        options: torchrun's own options.
        module: the entry point, such as `maskmoe.training.pretrain`.
        arguments: the entry point's arguments.
    """
    return (sys.executable, "-m", "torch.distributed.run", *options, "-m", module, *arguments)


def standalone_command(
    processes: int, module: str, arguments: Iterable[str] = (), options: Iterable[str] = ()
) -> tuple[str, ...]:
    """Return the words that run a module as ranks on this machine alone.

    Args:
        processes: the number of ranks.
        module: the entry point, such as `maskmoe.training.pretrain`.
        arguments: the entry point's arguments.
        options: further options of torchrun.
    """
    return torchrun_words(("--standalone", "--nproc-per-node", str(processes), *options), module, arguments)
