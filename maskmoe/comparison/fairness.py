"""Require that the variants of a comparison have the same number of active parameters."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from maskmoe.errors import UserError

_TOLERANCE = 0.02
_TOTAL = re.compile(r"^parameters .* (?P<number>[\d,]+)$")
_ACTIVE = re.compile(r"^active .* (?P<number>[\d,]+)  for a token")


@dataclass(frozen=True)
class Parameters:
    """The number of parameters of a variant.

    Attributes:
        total: all parameters.
        active: the parameters that a token passes through.
    """

    total: int
    active: int

    @classmethod
    def from_check(cls, lines: Sequence[str]) -> "Parameters | None":
        """Read the numbers from the output of training's `--check`; return None if the output states none."""
        total = next((match for match in map(_TOTAL.match, lines) if match), None)
        active = next((match for match in map(_ACTIVE.match, lines) if match), None)
        if total is None:
            return None
        return cls(*(int(match["number"].replace(",", "")) for match in (total, active or total)))


def check_active_parameters(parameters: dict[str, Parameters]) -> None:
    """Refuse to compare models of different size.

    The tolerance allows for routers, which a dense model does not have.

    Args:
        parameters: numbers of parameters by name of the variant.

    Raises:
        UserError: the smallest and the largest variant differ too much.
    """
    by_size = sorted(parameters, key=lambda name: parameters[name].active)
    smallest, largest = parameters[by_size[0]], parameters[by_size[-1]]
    if largest.active > (1 + _TOLERANCE) * smallest.active:
        raise UserError(
            f"variant {by_size[-1]} has {largest.active:,} active parameters and {by_size[0]} {smallest.active:,}: "
            f"variants can be compared if their numbers differ by at most {_TOLERANCE:.0%}; choose other widths"
        )
