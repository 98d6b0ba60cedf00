"""A dense model as a MaskMoE model: every expert starts as the dense MLP, or as a part of it.

Sparse upcycling (arXiv 2212.05055); experts that start as parts of the MLP, with routers that choose all of them
together, after "Upcycling Large Language Models into Mixture of Experts" (arXiv 2410.07524); columns that start anew
after Drop-Upcycling (arXiv 2502.19261).
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import inf, prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from maskmoe.conversion.blocks import (
    Block,
    Copy,
    RearrangedSource,
    TensorSource,
    TensorSpec,
    row_major_blocks,
)
from maskmoe.conversion.config_mapping import expand_layer_frequency
from maskmoe.conversion.families import PLAIN_EXPERTS, OpenedModel, with_routing_mask
from maskmoe.conversion.model_tensors import Shapes, tensor_shapes
from maskmoe.conversion.sources import JoinedSource
from maskmoe.conversion.writing import BLOCK_BYTES
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask, unpack_bits

# The output of a layer with a shared expert is the sum of two copies of the MLP, each half of it.
_HALF = 0.5
# Random numbers are drawn for so many rows together, wherever a block that is read begins or ends.
_ROWS_DRAWN = 64

_ROUTER = ".mlp.gate.weight"
_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"
_SHARED_EXPERTS = ".shared_experts."


@dataclass(frozen=True)
class UpcycleSettings:
    """How experts are made of an MLP.

    Attributes:
        num_experts: N.
        topk: k.
        granularity: g, into how many experts the MLP is divided; expert e starts as part e % g of it. N and k are
            multiples of g, and the routers start so that the g parts of one copy are chosen together.
        moe_layer_freq: which layers get experts, as Megatron's flag has it: every so many, or 0 or 1 for each.
        shared_expert: whether each such layer gets a shared expert, too: a copy of the whole MLP.
        noise: standard deviation of relative noise on the experts' weights.
        reinitialised: share of an expert's intermediate features that start anew, from the mean and the standard
            deviation of the MLP's weights; which ones, is drawn for each expert.
        seed: of everything random.

    Raises:
        UserError: the settings contradict each other.
    """

    num_experts: int
    topk: int = 2
    granularity: int = 1
    moe_layer_freq: int | list[int] = 1
    shared_expert: bool = False
    noise: float = 0.0
    reinitialised: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_experts < 2 or not 1 <= self.topk <= self.num_experts:
            raise UserError(f"cannot choose {self.topk} of {self.num_experts} experts")
        if self.granularity < 1 or self.num_experts % self.granularity or self.topk % self.granularity:
            raise UserError(
                f"experts that are 1/{self.granularity} of the MLP are chosen {self.granularity} at a time: "
                f"--num-experts {self.num_experts} and --topk {self.topk} must be multiples of it"
            )
        if not 0 <= self.noise < inf:
            raise UserError(f"--noise {self.noise} is no standard deviation")
        if not 0 <= self.reinitialised <= 1:
            raise UserError(f"--reinit-share {self.reinitialised} is no share; give 0 to 1")
        if self.seed < 0:
            raise UserError(f"the seed must not be negative, it is {self.seed}")

    def is_sparse(self, num_layers: int) -> list[bool]:
        """Which layers get experts.

        Raises:
            UserError: `moe_layer_freq` is for another number of layers, or has none.
        """
        is_sparse = expand_layer_frequency(self.moe_layer_freq, num_layers)
        if len(is_sparse) != num_layers:
            raise UserError(f"--moe-layer-freq is for {len(is_sparse)} layers, the model has {num_layers}")
        if not any(is_sparse):
            raise UserError("--moe-layer-freq gives experts to no layer")
        return is_sparse


def upcycle(dense: OpenedModel, settings: UpcycleSettings, mask: RoutingMask) -> OpenedModel:
    """Make a MaskMoE model of a dense one. Nothing is read before it is asked for, and blocks can be of any size.

    The new model computes what the dense one did, up to rounding, where the weights of a token's experts add up to 1
    and each is the dense MLP, or all of its parts are among them. So it is without noise and features that start anew,
    for k of 2 or more, or V = 1 for every id; with parts of the MLP, if each visible set consists of whole copies.
    `changes_of_function` says whether that holds.

    Args:
        dense: all of whose layers are dense.
        settings: how experts are made.
        mask: the routing mask, for the model's vocabulary and number of layers.

    Raises:
        UserError: the model has experts already, the settings do not suit it, or the mask does not fit.
    """
    if "sparse" in dense.config["mlp_layer_types"]:
        raise UserError("only a model without experts can be upcycled, this one has some")
    config = dense.config | _expert_fields(dense.config, settings)
    shapes = tensor_shapes(config)
    router_shapes = {name: shape for name, shape in shapes.items() if name.endswith(_ROUTER)}
    copied_shapes = {name: shape for name, shape in shapes.items() if name not in router_shapes}
    copies = [copy for name, shape in copied_shapes.items() for copy in _copies(name, shape, settings.granularity)]
    copied = RearrangedSource(dense.source, copied_shapes, copies)
    dtype = dense.source.tensors["model.embed_tokens.weight"].dtype
    sources = [_Routers(router_shapes, dtype, config["initializer_range"], settings), copied]
    if settings.shared_expert:
        sources.insert(0, _HalvedSharedExperts(copied))
    if settings.noise or settings.reinitialised:
        sources.insert(0, _ChangedExperts(copied, dense.source, settings))
    return with_routing_mask(OpenedModel(JoinedSource(*sources), config), mask)


def changes_of_function(settings: UpcycleSettings, mask: RoutingMask) -> list[str]:
    """Why an upcycled model does not compute what the dense one did; empty if it does, up to rounding."""
    changes = []
    if settings.noise:
        changes.append("the experts have noise")
    if settings.reinitialised:
        changes.append("parts of the experts start anew")
    if settings.topk == 1 and mask.max_visible > 1:
        changes.append("with k = 1 an expert's output is multiplied by its probability, which is below 1 where V > 1")
    if not _shows_whole_copies(mask, settings.granularity):
        changes.append(f"the mask shows some ids a part of the {settings.granularity} experts that make up the MLP")
    return changes


def _shows_whole_copies(mask: RoutingMask, granularity: int) -> bool:
    """Whether every visible set that an id has consists of whole groups of so many neighbouring experts."""
    if granularity == 1:
        return True
    for row_of_id, visible_bits in zip(mask.row_of_id, mask.visible_bits, strict=True):
        sets = unpack_bits(visible_bits[np.unique(row_of_id)], mask.num_experts)
        of_group = sets.reshape(len(sets), -1, granularity)
        if (of_group.any(axis=2) != of_group.all(axis=2)).any():
            return False
    return True


def _expert_fields(config: Mapping[str, Any], settings: UpcycleSettings) -> dict[str, Any]:
    """The fields of a dense model's configuration that become others."""
    features, remainder = divmod(config["intermediate_size"], settings.granularity)
    if remainder:
        raise UserError(f"intermediate_size {config['intermediate_size']} cannot be divided by {settings.granularity}")
    return PLAIN_EXPERTS | {
        "mlp_layer_types": [
            "sparse" if sparse else "dense" for sparse in settings.is_sparse(config["num_hidden_layers"])
        ],
        "num_experts": settings.num_experts,
        "num_experts_per_tok": settings.topk,
        "moe_intermediate_size": features,
        # Over a single chosen expert, a softmax would be constant and the router without gradient.
        "norm_topk_prob": settings.topk > 1,
        "routed_scaling_factor": settings.granularity * (_HALF if settings.shared_expert else 1.0),
        "shared_expert_intermediate_size": config["intermediate_size"] if settings.shared_expert else 0,
    }


def _copies(name: str, shape: tuple[int, ...], granularity: int) -> Iterator[Copy]:
    """What fills a tensor from the dense model's."""
    mlp = name.partition(".experts.")[0]
    if name.endswith(_GATE_UP):
        num_experts, rows, hidden = shape
        features = rows // 2
        for expert in range(num_experts):
            first = expert % granularity * features
            for part, projection in enumerate(("gate_proj", "up_proj")):
                source = Block(f"{mlp}.{projection}.weight", (first, 0), (features, hidden))
                yield Copy(source, Block(name, (expert, part * features, 0), (1, features, hidden)))
    elif name.endswith(_DOWN):
        num_experts, hidden, features = shape
        for expert in range(num_experts):
            first = expert % granularity * features
            source = Block(f"{mlp}.down_proj.weight", (0, first), (hidden, features))
            yield Copy(source, Block(name, (expert, 0, 0), (1, hidden, features)))
    else:
        yield Copy(Block.whole(name.replace(_SHARED_EXPERTS, "."), shape), Block.whole(name, shape))


class _Routers:
    """Routers drawn from a normal distribution; the experts that make up one copy of the MLP have equal rows."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, std: float, settings: UpcycleSettings):
        self.tensors = {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}
        self._std = std
        self._settings = settings

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`."""
        spec = self.tensors[block.tensor]
        num_experts, hidden = spec.shape
        of_copies = torch.empty(num_experts // self._settings.granularity, hidden)
        of_copies.normal_(std=self._std, generator=_generator(self._settings.seed, block.tensor))
        weight = of_copies.repeat_interleave(self._settings.granularity, dim=0)
        return weight[block.slices].to(spec.dtype)


class _HalvedSharedExperts:
    """The output projections of shared experts, halved."""

    def __init__(self, source: TensorSource):
        self._source = source
        self.tensors = {
            name: spec for name, spec in source.tensors.items() if _SHARED_EXPERTS in name and "down_proj" in name
        }

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`."""
        return self._source.read(block) * _HALF


class _ChangedExperts:
    """Experts with noise, or with features that start anew.

    Args:
        source: of the experts as they are copied.
        dense: of the MLPs that they are copied from.
        settings: of what changes.
    """

    def __init__(self, source: TensorSource, dense: TensorSource, settings: UpcycleSettings):
        self.tensors = {name: spec for name, spec in source.tensors.items() if name.endswith((_GATE_UP, _DOWN))}
        self._source = source
        self._dense = dense
        self._settings = settings
        self._statistics_of = cache(self._statistics)

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`."""
        changed = self._source.read(block).clone()
        first_expert, first_row, first_column = block.offsets
        rows = slice(first_row, first_row + block.sizes[1])
        columns = slice(first_column, first_column + block.sizes[2])
        for index, expert in enumerate(range(first_expert, first_expert + block.sizes[0])):
            normal = self._normal(block.tensor, expert, rows)[:, columns]
            weights = changed[index].float()
            if self._settings.noise:
                weights = torch.addcmul(weights, weights, normal, value=self._settings.noise)
            if self._settings.reinitialised:
                is_new, mean, std = (values[rows, columns] for values in self._new_weights(block.tensor, expert))
                weights = torch.where(is_new, normal.mul_(std).add_(mean), weights)
            changed[index] = weights
        return changed

    def _normal(self, name: str, expert: int, rows: slice) -> Tensor:
        """Normal numbers [rows, columns of the tensor], the same whatever rows they are asked for with."""
        num_columns = self.tensors[name].shape[2]
        first, last = rows.start // _ROWS_DRAWN, (rows.stop - 1) // _ROWS_DRAWN
        drawn = torch.empty(last + 1 - first, _ROWS_DRAWN, num_columns)
        for group, numbers in enumerate(drawn, start=first):
            numbers.normal_(generator=_generator(self._settings.seed, name, expert, group))
        start = first * _ROWS_DRAWN
        return drawn.flatten(0, 1)[rows.start - start : rows.stop - start]

    def _new_weights(self, name: str, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which weights start anew, with what mean and standard deviation; all [rows, columns], expanded."""
        _, num_rows, num_columns = self.tensors[name].shape
        mlp = name.partition(".experts.")[0]
        if name.endswith(_DOWN):
            mean, std = self._statistics_of(f"{mlp}.down_proj.weight").unbind()
            parts = (self._new_features(mlp, expert, num_columns), mean, std)
        else:
            features = num_rows // 2
            of_parts = [self._statistics_of(f"{mlp}.{part}_proj.weight") for part in ("gate", "up")]
            mean, std = torch.stack(of_parts).repeat_interleave(features, dim=0).unsqueeze(-1).unbind(dim=1)
            parts = (self._new_features(mlp, expert, features).repeat(2).unsqueeze(-1), mean, std)
        return tuple(part.expand(num_rows, num_columns) for part in parts)

    def _new_features(self, mlp: str, expert: int, num_features: int) -> Tensor:
        """Which features of an expert start anew, bool [features]."""
        number = round(self._settings.reinitialised * num_features)
        is_new = torch.zeros(num_features, dtype=torch.bool)
        order = torch.randperm(num_features, generator=_generator(self._settings.seed, mlp, expert))
        is_new[order[:number]] = True
        return is_new

    def _statistics(self, name: str) -> Tensor:
        """Mean and standard deviation of a dense tensor, float32 [2]."""
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
    """The random stream of a part of a tensor."""
    sequence = np.random.SeedSequence(seed, spawn_key=(crc32(name.encode()), *numbers))
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))


def add_upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `settings_from` reads, and `--routing-mask`."""
    parser.add_argument(
        "--routing-mask",
        type=Path,
        required=True,
        metavar="F",
        help="routing mask made by tools/build_routing_mask.py for the model's vocabulary (vocab_size in config.json)",
    )
    parser.add_argument("--num-experts", type=int, required=True, metavar="N", help="experts in each MoE layer")
    parser.add_argument(
        "--topk", type=int, default=UpcycleSettings.topk, metavar="K", help="experts of a token (default: %(default)s)"
    )
    parser.add_argument(
        "--granularity",
        type=int,
        default=UpcycleSettings.granularity,
        metavar="G",
        help="make experts of 1/G of the MLP's size (default: %(default)s, whole copies); N and K are multiples of it",
    )
    parser.add_argument(
        "--moe-layer-freq",
        type=_moe_layer_freq,
        default=UpcycleSettings.moe_layer_freq,
        metavar="FREQ",
        help="which layers get experts, as Megatron's flag: every so many, or a list such as [0]+[1]*23 (default: all)",
    )
    parser.add_argument("--shared-expert", action="store_true", help="give each MoE layer a shared expert, too")
    parser.add_argument(
        "--noise", type=float, default=UpcycleSettings.noise, metavar="S", help="relative noise on experts' weights"
    )
    parser.add_argument(
        "--reinit-share",
        type=float,
        default=UpcycleSettings.reinitialised,
        metavar="R",
        help="share of each expert's features that start anew, as in Drop-Upcycling (0.5 there)",
    )
    parser.add_argument("--seed", type=int, default=UpcycleSettings.seed, metavar="S", help="of routers, noise, drops")


def _moe_layer_freq(text: str) -> int | list[int]:
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    from megatron.training.arguments import moe_freq_type

    try:
        frequency = moe_freq_type(text)
    except (SyntaxError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no pattern of layers") from error
    if isinstance(frequency, int) and frequency < 1:
        raise argparse.ArgumentTypeError("every how many layers must be 1 or more")
    if isinstance(frequency, list) and not all(is_sparse in (0, 1) for is_sparse in frequency):
        raise argparse.ArgumentTypeError("a pattern has 1 for layers with experts, and 0 for others")
    return frequency


def settings_from(arguments: argparse.Namespace) -> UpcycleSettings:
    """The settings that the flags describe.

    Raises:
        UserError: they contradict each other.
    """
    return UpcycleSettings(
        num_experts=arguments.num_experts,
        topk=arguments.topk,
        granularity=arguments.granularity,
        moe_layer_freq=arguments.moe_layer_freq,
        shared_expert=arguments.shared_expert,
        noise=arguments.noise,
        reinitialised=arguments.reinit_share,
        seed=arguments.seed,
    )
