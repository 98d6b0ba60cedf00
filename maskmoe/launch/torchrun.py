"""The command line of torchrun for one machine."""

import sys
from collections.abc import Iterable


def standalone_command(processes: int, module: str, arguments: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the words that run `python -m module` as ranks on this machine alone.

    Args:
        processes: number of ranks.
        module: the entry point, such as `maskmoe.training.pretrain`.
        arguments: the entry point's arguments.
    """
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return (*launcher, "-m", module, *arguments)
