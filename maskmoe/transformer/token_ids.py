"""The per-token tensor that rides on Megatron-Core's `padding_mask`: token ids, and which of them are padding.

It is int64 [batch, sequence], the ids; or [2, batch, sequence], the ids and then 1 where a token is padding. Which of
the two is known from the shape, so that a model without padding pays nothing for the possibility. The sequence comes
last in both, where multi-token prediction shifts it.
"""

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor


def pack_token_ids(token_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Put ids and padding into one tensor.

    Args:
        token_ids: int64 [batch, sequence].
        padding_mask: bool [batch, sequence], True where a token is padding; None: there is none.

    Raises:
        ValueError: the shapes differ.
    """
    if padding_mask is None:
        return token_ids
    if padding_mask.shape != token_ids.shape:
        raise ValueError(
            f"the padding mask has shape {list(padding_mask.shape)}, the token ids have {list(token_ids.shape)}"
        )
    return torch.stack([token_ids, padding_mask.to(token_ids.dtype)])


def unpack_token_ids(packed: Tensor) -> tuple[Tensor, Tensor | None]:
    """The ids, int64, and the padding mask, bool, if there is one; both of the last two dimensions."""
    if packed.dim() == 2:
        return packed, None
    token_ids, padding_mask = packed
    return token_ids, padding_mask.bool()


def take_part_of_sequence(packed: Tensor, tp_group: torch.distributed.ProcessGroup) -> Tensor:
    """The part [..., sequence / tp] that sequence parallelism gives this rank."""
    return packed.chunk(get_pg_size(tp_group), dim=-1)[get_pg_rank(tp_group)]


def gather_sequence(packed: Tensor, tp_group: torch.distributed.ProcessGroup) -> Tensor:
    """The whole [..., sequence] from the parts of all ranks."""
    sequence_first = packed.movedim(-1, 0).contiguous()
    return gather_from_sequence_parallel_region(sequence_first, group=tp_group).movedim(0, -1)
