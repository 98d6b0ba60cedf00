"""Sums over the tokens of a micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """Columns to sum over tokens.

    Attributes:
        values: [tokens, columns]. Tokens are ordered by position, then by sequence.
        dtype: The dtype of the sums, except in compiled code.
        num_sequences: The sequences whose tokens are summed apart.
    """

    values: Tensor
    dtype: torch.dtype
    num_sequences: int = 1


def sum_columns(parts: Sequence[Columns]) -> list[Tensor]:
    """Sum columns: [sequences, columns] for each part.

    Compiled code sums all parts in one pass, to parts of one float32 tensor. There, counts are exact up to 2^24 tokens.
    """
    if not torch.compiler.is_compiling():
        return [_sum(part.values, part.num_sequences, part.dtype) for part in parts]
    most = max(part.num_sequences for part in parts)
    joined = torch.cat([part.values.float() for part in parts], dim=1)
    sums = _sum(joined, most, torch.float32).split([part.values.shape[1] for part in parts], dim=1)
    return [
        each if part.num_sequences == most else each.sum(dim=0, keepdim=True)
        for each, part in zip(sums, parts, strict=True)
    ]


def _sum(values: Tensor, num_sequences: int, dtype: torch.dtype) -> Tensor:
    """Sum the tokens of each sequence: [sequences, columns]."""
    width = num_sequences * values.shape[1]
    return values.reshape(-1, width).sum(dim=0, dtype=dtype).view(num_sequences, -1)
