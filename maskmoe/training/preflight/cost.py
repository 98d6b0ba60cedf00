"""States what a training run costs: Megatron's count of floating-point operations."""

from argparse import Namespace
from copy import deepcopy
from dataclasses import dataclass

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.training.training import num_floating_point_operations

from maskmoe.training.preflight.parameters import ExpertUse
from maskmoe.training.settings.batch_sizes import trained_samples


@dataclass(frozen=True)
class TrainingCost:
    """The floating-point operations of a training run.

    Attributes:
        flops_per_token: operations of the forward and the backward pass, without recomputation.
        tokens: all tokens of the run, those before a checkpoint included.
    """

    flops_per_token: float
    tokens: int

    @property
    def flops(self) -> float:
        """Return the operations of the whole run."""
        return self.flops_per_token * self.tokens


def compute_cost(args: Namespace, expert_use: ExpertUse) -> TrainingCost:
    """Count the operations of a training run as Megatron does, with the experts that tokens use under the mask.

    Args:
        args: arguments that Megatron has validated.
        expert_use: how many experts tokens use.
    """
    counted = deepcopy(args)
    counted.moe_router_topk = expert_use.mean
    if args.hybrid_layer_pattern is not None:
        # Megatron counts no latent attention in hybrid models. Count it as attention.
        counted.hybrid_layer_pattern = args.hybrid_layer_pattern.replace(Symbols.MLA, Symbols.ATTENTION)
    flops = num_floating_point_operations(counted, batch_size=1)
    return TrainingCost(flops / args.seq_length, trained_samples(args) * args.seq_length)
