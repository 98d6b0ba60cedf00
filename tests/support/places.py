"""Places where the ranks of a test run: GPUs over NCCL, or CPU cores over gloo that take the branches of GPUs.

A test with `@pytest.mark.parametrize("place", PLACES)` runs the same body everywhere, so that only the device differs.
"""

from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from maskmoe.launch.machine import find_devices


@cache
def num_gpus() -> int:
    """Return the number of GPUs that torch finds on this machine."""
    return find_devices().num_gpus


class Place(Enum):
    """The devices that the ranks of a test use, and their number."""

    ONE_CORE = "one core"
    CORES = "two cores"
    ONE_GPU = "one GPU"
    ALL_GPUS = "all GPUs"

    @property
    def is_gpu(self) -> bool:
        """Whether the ranks compute on GPUs."""
        return self in (Place.ONE_GPU, Place.ALL_GPUS)

    def num_ranks(self) -> int:
        """Return the number of ranks; skip the test if all GPUs are one GPU, which another place covers."""
        if self is Place.ALL_GPUS and num_gpus() == 1:
            pytest.skip("this machine has one GPU")
        return {Place.ONE_CORE: 1, Place.CORES: 2, Place.ONE_GPU: 1, Place.ALL_GPUS: num_gpus()}[self]


PLACES = [pytest.param(place, id=place.value, marks=[pytest.mark.gpu] * place.is_gpu) for place in Place]
"""All places with their marks."""


def take_gpu_branches(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let models take the branches of GPUs while their tensors are on the CPU; `replace` sets an attribute."""
    replace(Tensor, "is_cuda", True)
