"""Chooses how many of the nodes that are there train, and with which flags."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from maskmoe.errors import UserError
from maskmoe.launch.model_file import Flags, ModelFile
from maskmoe.launch.options import NodeRange


@dataclass(frozen=True)
class Choice:
    """How many nodes train, and the flags of their ranks.

    Attributes:
        nodes: the number of nodes that train: the first ones of those that are there.
        flags: the flags of the ranks.
    """

    nodes: int
    flags: Flags


class LayoutChooser:
    """Chooses layouts from the model file, and checks each one once before it is used.

    Args:
        model: the model file.
        nodes: on how many nodes the run may train.
        complete: adds the run's folders and the user's flags to the flags of the model file.
        check: returns whether a run with some flags on a number of ranks may start; prints what is wrong.
    """

    def __init__(
        self,
        model: ModelFile,
        nodes: NodeRange,
        complete: Callable[[Flags], Flags],
        check: Callable[[Flags, int], bool],
    ) -> None:
        self._model = model
        self._nodes = nodes
        self._complete = complete
        self._check = check
        self._verdicts: dict[int, bool] = {}

    def count(self, node_ranks: Sequence[int]) -> int:
        """Return how many nodes, from the first on, have a layout that is not known to fail; 0 for none.

        Args:
            node_ranks: the number of ranks of each node that is there.
        """
        for number in range(min(len(node_ranks), self._nodes.most), self._nodes.least - 1, -1):
            ranks = sum(node_ranks[:number])
            if self._model.fits(ranks) and self._verdicts.get(ranks, True):
                return number
        return 0

    def choose(self, node_ranks: Sequence[int]) -> Choice:
        """Choose the largest number of nodes that have a layout which passes the check.

        Args:
            node_ranks: the number of ranks of each node that is there; at least as many nodes as must train.

        Raises:
            UserError: no number of nodes has such a layout.
        """
        while number := self.count(node_ranks):
            ranks = sum(node_ranks[:number])
            flags = self._complete(self._model.flags_for(ranks))
            if ranks not in self._verdicts:
                self._verdicts[ranks] = self._check(flags, ranks)
            if self._verdicts[ranks]:
                return Choice(number, flags)
            print(f"launch: {ranks} ranks cannot train (see above)", file=sys.stderr, flush=True)
        raise UserError(
            f"none of {self._nodes.least} to {min(len(node_ranks), self._nodes.most)} nodes can train: the model file "
            f"{self._model.path} needs a layout for one of these numbers of nodes"
        )


def describe_changes(before: Flags, after: Flags) -> str:
    """Describe how the flags of a generation differ from those before it; empty if they do not differ."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"--{name} {_words(before, name)} → {_words(after, name)}" for name in names)


def _words(flags: Mapping[str, tuple[str, ...]], name: str) -> str:
    return " ".join(flags[name]) or "set" if name in flags else "not set"
