"""Require that the variants of a comparison have the same number of active parameters."""

import json
from collections.abc import Sequence

from pydantic import BaseModel

from maskmoe.errors import UserError

_TOLERANCE = 0.02
_FIRST_LINE = "{"  # of the report, and of no other line in it


class Parameters(BaseModel, frozen=True):
    """The number of parameters of a variant.

    Attributes:
        total: all parameters.
        active: the parameters that a token passes through.
    """

    total: int
    active: int

    @classmethod
    def from_check(cls, lines: Sequence[str]) -> "Parameters | None":
        """Read the numbers from the log of `--check --json`; return None if the log states none."""
        starts = [number for number, line in enumerate(lines) if line == _FIRST_LINE]
        if not starts:
            return None
        report, _ = json.JSONDecoder().raw_decode("\n".join(lines[starts[-1] :]))
        found = report["parameters"]
        return cls.model_validate(found) if found else None


def check_active_parameters(parameters: dict[str, Parameters]) -> None:
    """Refuse to compare models of different size.

    The tolerance allows for routers, which a dense model does not have.

    Args:
        parameters: numbers of parameters by name of the variant.

    Raises:
        UserError: the smallest and the largest variant differ too much.
    """
    if not parameters:
        return
    by_size = sorted(parameters, key=lambda name: parameters[name].active)
    smallest, largest = parameters[by_size[0]], parameters[by_size[-1]]
    if largest.active > (1 + _TOLERANCE) * smallest.active:
        raise UserError(
            f"variant {by_size[-1]} has {largest.active:,} active parameters and {by_size[0]} {smallest.active:,}: "
            f"variants can be compared if their numbers differ by at most {_TOLERANCE:.0%}; choose other widths"
        )
