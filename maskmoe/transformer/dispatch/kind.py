"""Names the ways to dispatch; free of torch, so that the simulation can use it."""

from enum import Enum


class DispatchKind(Enum):
    """A way to dispatch tokens to their experts; the values are for people."""

    STOCK = "Megatron's all-to-all: one row for every selected expert"
    ONE_COPY = "one copy of a token for each rank"
    PLANNED = "one copy of a token for each rank, planned from the token ids"
