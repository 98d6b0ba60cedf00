"""Sources of the tensors that an upcycled model does not copy unchanged: routers, shared experts, changed experts.

All of them can be read in blocks of any size: random numbers depend on the seed, the tensor and the place in the
tensor, never on the order of reads.
"""

from functools import cache
from math import prod
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from maskmoe.conversion.blocks import Block, TensorSource, TensorSpec, row_major_blocks
from maskmoe.conversion.model_tensors import Shapes
from maskmoe.conversion.settings import UpcycleSettings
from maskmoe.conversion.writing import BLOCK_BYTES

SHARED_EXPERT_SCALE = 0.5
"""A layer with a shared expert adds up two copies of the MLP, so each of them is scaled by one half."""

ROUTER = ".mlp.gate.weight"
GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"
SHARED_EXPERTS = ".shared_experts."

# Random numbers are drawn for this number of rows together, so that they do not depend on where a block begins or ends.
_ROWS_PER_DRAW = 64


class NewRouters:
    """Draws routers from a normal distribution; the experts that make up one copy of the MLP have equal rows.

    Args:
        shapes: shapes of the routers' weights by name, each [experts, hidden].
        dtype: dtype of the weights.
        std: standard deviation of the weights.
        settings: the number of experts in a copy, and the seed.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, std: float, settings: UpcycleSettings) -> None:
        self.tensors = {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}
        self._std = std
        self._settings = settings

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        spec = self.tensors[block.tensor]
        num_experts, hidden = spec.shape
        copy_rows = torch.empty(num_experts // self._settings.granularity, hidden)
        copy_rows.normal_(std=self._std, generator=_generator(self._settings.seed, block.tensor))
        weight = copy_rows.repeat_interleave(self._settings.granularity, dim=0)
        return weight[block.slices].to(spec.dtype)


class ScaledSharedExperts:
    """Scales the output projections of shared experts by `SHARED_EXPERT_SCALE`.

    Args:
        source: provides the shared experts as copies of the MLP.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.tensors = {
            name: spec for name, spec in source.tensors.items() if SHARED_EXPERTS in name and "down_proj" in name
        }

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        return self._source.read(block) * SHARED_EXPERT_SCALE


class ChangedExperts:
    """Adds noise to experts, and draws some of their intermediate features anew.

    Args:
        source: provides the experts as copies of the MLP.
        dense: provides the MLPs that the experts are copied from.
        settings: strength of the noise, share of new features, and the seed.
    """

    def __init__(self, source: TensorSource, dense: TensorSource, settings: UpcycleSettings) -> None:
        self.tensors = {name: spec for name, spec in source.tensors.items() if name.endswith((GATE_UP, DOWN))}
        self._source = source
        self._dense = dense
        self._settings = settings
        self._mean_and_std_of = cache(self._mean_and_std)

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        changed = self._source.read(block).clone()
        first_expert, first_row, first_column = block.offsets
        rows = slice(first_row, first_row + block.sizes[1])
        columns = slice(first_column, first_column + block.sizes[2])
        for index, expert in enumerate(range(first_expert, first_expert + block.sizes[0])):
            normal = self._normal_numbers(block.tensor, expert, rows)[:, columns]
            weights = changed[index].float()
            if self._settings.noise:
                weights = torch.addcmul(weights, weights, normal, value=self._settings.noise)
            if self._settings.reinitialised:
                is_new, mean, std = (values[rows, columns] for values in self._new_weights(block.tensor, expert))
                weights = torch.where(is_new, normal.mul_(std).add_(mean), weights)
            changed[index] = weights
        return changed

    def _normal_numbers(self, name: str, expert: int, rows: slice) -> Tensor:
        """Return standard normal numbers, float32 [rows, columns of the tensor]; a row always has the same numbers."""
        num_columns = self.tensors[name].shape[2]
        first, last = rows.start // _ROWS_PER_DRAW, (rows.stop - 1) // _ROWS_PER_DRAW
        drawn = torch.empty(last + 1 - first, _ROWS_PER_DRAW, num_columns)
        for group, numbers in enumerate(drawn, start=first):
            numbers.normal_(generator=_generator(self._settings.seed, name, expert, group))
        start = first * _ROWS_PER_DRAW
        return drawn.flatten(0, 1)[rows.start - start : rows.stop - start]

    def _new_weights(self, name: str, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return which weights of an expert are drawn anew, and from which distribution.

        Args:
            name: name of the stacked tensor of all experts.
            expert: number of the expert.

        Returns:
            is_new: bool [rows, columns].
            mean: float32 [rows, columns], mean of the distribution.
            std: float32 [rows, columns], standard deviation of the distribution.
        """
        _, num_rows, num_columns = self.tensors[name].shape
        mlp = name.partition(".experts.")[0]
        if name.endswith(DOWN):
            mean, std = self._mean_and_std_of(f"{mlp}.down_proj.weight").unbind()
            is_new = self._new_features(mlp, expert, num_columns)
        else:  # the gate projection's rows, then the up projection's
            features = num_rows // 2
            of_projections = [self._mean_and_std_of(f"{mlp}.{part}_proj.weight") for part in ("gate", "up")]
            mean, std = torch.stack(of_projections).repeat_interleave(features, dim=0).unsqueeze(-1).unbind(dim=1)
            is_new = self._new_features(mlp, expert, features).repeat(2).unsqueeze(-1)
        shape = (num_rows, num_columns)
        return is_new.expand(shape), mean.expand(shape), std.expand(shape)

    def _new_features(self, mlp: str, expert: int, num_features: int) -> Tensor:
        """Draw which features of an expert are new, bool [features]; the same ones in all projections."""
        number = round(self._settings.reinitialised * num_features)
        is_new = torch.zeros(num_features, dtype=torch.bool)
        order = torch.randperm(num_features, generator=_generator(self._settings.seed, mlp, expert))
        is_new[order[:number]] = True
        return is_new

    def _mean_and_std(self, name: str) -> Tensor:
        """Return mean and standard deviation of a tensor of the dense model, float32 [2]."""
        spec = self._dense.tensors[name]
        total, squares = 0.0, 0.0
        for block in row_major_blocks(name, spec, BLOCK_BYTES):
            values = self._dense.read(block).double()
            total += values.sum().item()
            squares += values.square().sum().item()
        count = prod(spec.shape)
        mean = total / count
        return torch.tensor([mean, max(squares / count - mean**2, 0.0) ** 0.5])


def _generator(seed: int, name: str, *numbers: int) -> torch.Generator:
    """Return a random generator for one part of a tensor.

    Args:
        seed: the user's seed.
        name: name of the tensor.
        numbers: identify the part of the tensor.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(crc32(name.encode()), *numbers))
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
