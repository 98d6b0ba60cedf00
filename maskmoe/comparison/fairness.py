"""Holds the variants of a comparison to the same number of active parameters."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from maskmoe.errors import UserError

_TOLERANCE = 0.02
_TOTAL = re.compile(r"^parameters .* (?P<number>[\d,]+)$")
_ACTIVE = re.compile(r"^active .* (?P<number>[\d,]+)  for a token")


@dataclass(frozen=True)
class Parameters:
    """How many parameters a variant has, and how many of them a token passes through."""

    total: int
    active: int

    @classmethod
    def from_check(cls, lines: Sequence[str]) -> "Parameters | None":
        """From what `--check` of training printed; None if it says nothing of parameters."""
        total = next((match for match in map(_TOTAL.match, lines) if match), None)
        active = next((match for match in map(_ACTIVE.match, lines) if match), None)
        if total is None:
            return None
        return cls(*(int(match["number"].replace(",", "")) for match in (total, active or total)))


def check_active_parameters(parameters: dict[str, Parameters]) -> None:
    """Refuse a comparison of unequal models.

    A router is allowed for: it is what a model with experts has and a dense one has not.

    Args:
        parameters: of the variants, by name.

    Raises:
        UserError: naming the two that differ most.
    """
    by_size = sorted(parameters, key=lambda name: parameters[name].active)
    smallest, largest = parameters[by_size[0]], parameters[by_size[-1]]
    if largest.active > (1 + _TOLERANCE) * smallest.active:
        raise UserError(
            f"variant {by_size[-1]} has {largest.active:,} active parameters and {by_size[0]} {smallest.active:,}: "
            f"they can be compared if they differ by at most {_TOLERANCE:.0%}; choose other widths"
        )
