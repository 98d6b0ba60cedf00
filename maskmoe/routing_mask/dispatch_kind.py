"""Names of the ways to dispatch. Imports no torch, because the simulation uses the names without torch."""

from enum import Enum


class DispatchKind(Enum):
    """A way to dispatch tokens to their experts; the values are shown in logs."""

    STOCK = "Megatron's own token dispatcher"
    ONE_RANK = "copies within the only rank of the experts"
    ONE_COPY = "one copy of a token for each rank"
    PLANNED = "one copy of a token for each rank, planned from the token ids"
