"""Chooses how many of the nodes that are there train, and with which flags."""

from collections.abc import Callable, Sequence

from maskmoe.errors import UserError, counted
from maskmoe.launch.command import run_flags
from maskmoe.launch.model_file import Flags, ModelFile, split_flags
from maskmoe.launch.node_run import say
from maskmoe.launch.options import Options


class LayoutChooser:
    """Chooses layouts from the model file, and checks each one once before it is used.

    Args:
        options: the launcher's options.
        model: the model file.
        check: returns whether a run with some flags on a number of ranks may start; prints what is wrong.

    Raises:
        UserError: the run saves no checkpoints, from which another set of nodes could continue.
    """

    def __init__(self, options: Options, model: ModelFile, check: Callable[[Flags, int], bool]) -> None:
        self._options = options
        self._model = model
        self._check = check
        self._verdicts: dict[int, bool] = {}
        if "save-interval" not in self._run_flags(model.flags):
            raise UserError(
                f"--nodes {options.nodes} needs --save-interval, because the run continues from checkpoints"
            )

    def count(self, node_ranks: Sequence[int]) -> int:
        """Return how many nodes, from the first on, have a layout that is not known to fail; 0 for none.

        Args:
            node_ranks: the number of ranks of each node that is there.
        """
        nodes = self._options.nodes
        for number in range(min(len(node_ranks), nodes.most), nodes.least - 1, -1):
            ranks = sum(node_ranks[:number])
            if self._model.fits(ranks) and self._verdicts.get(ranks, True):
                return number
        return 0

    def choose(self, node_ranks: Sequence[int]) -> tuple[int, Flags]:
        """Return the largest number of nodes that have a layout which passes the check, and the flags of their ranks.

        Args:
            node_ranks: the number of ranks of each node that is there; at least as many nodes as must train.

        Raises:
            UserError: no number of nodes has such a layout.
        """
        while number := self.count(node_ranks):
            ranks = sum(node_ranks[:number])
            flags = self._run_flags(self._model.flags_for(ranks))
            if ranks not in self._verdicts:
                self._verdicts[ranks] = self._check(flags, ranks)
            if self._verdicts[ranks]:
                return number, flags
            say(f"{counted(ranks, 'rank')} cannot train (see above)")
        raise UserError(
            f"none of {self._options.nodes.least} to {min(len(node_ranks), self._options.nodes.most)} nodes can train: "
            f"the model file {self._model.path} needs a layout for one of these numbers of nodes"
        )

    def _run_flags(self, model_flags: Flags) -> Flags:
        return run_flags(self._options, model_flags, split_flags(self._options.flags))


def describe_changes(before: Flags, after: Flags) -> str:
    """Describe how the flags of a generation differ from those before it; empty if they do not differ."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"--{name} {_words(before, name)} → {_words(after, name)}" for name in names)


def _words(flags: Flags, name: str) -> str:
    return " ".join(flags[name]) or "set" if name in flags else "not set"
