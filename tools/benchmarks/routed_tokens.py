"""Tokens and masks for the benchmarks of dispatchers and MoE layers, and the floor of the exchange."""

import argparse
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from zipf import zipf_mask, zipf_probabilities

from maskmoe.megatron_compat import cpu
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.routing_mask.assignment import MaskRecipe
from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.dispatch.choose import choose_dispatch
from maskmoe.transformer.dispatch.plan import DispatchPlanner
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import VisibleExperts

VOCAB_SIZE = 8192
MASKS = ("rank-local", "any")
"""`rank-local`: every id sees max(2, k) experts, all on one rank. `any`: every id sees all experts."""


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens of one rank.

    Attributes:
        hidden: hidden states [tokens, 1, hidden].
        gradient: the gradient of the output [tokens, 1, hidden].
        ids: int64 [1, tokens].
        visible_experts: the mask.
        kind: the way to dispatch.
        planner: plans the dispatch; None for other ways to dispatch.
    """

    hidden: Tensor
    gradient: Tensor
    ids: Tensor
    visible_experts: VisibleExperts
    kind: DispatchKind
    planner: DispatchPlanner | None

    def plan_ids(self) -> TokenIds:
        """Return the ids [1, tokens], with a new plan if dispatch is planned."""
        token_ids = TokenIds(self.ids)
        return token_ids if self.planner is None else TokenIds(self.ids, plan=self.planner.plan(token_ids))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose tokens and cases."""
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each rank (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=512, help="features of a token (default: %(default)s)")
    parser.add_argument(
        "--experts",
        nargs="+",
        type=harness.sizes("K/N"),
        default=["1/16", "2/16", "8/64"],
        metavar="K/N",
        help="cases: top-K of N experts (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of hidden states and weights (default: %(default)s)",
    )
    parser.add_argument(
        "--dispatches-alone",
        action="store_true",
        help="on one rank, dispatch as several ranks would, instead of by Megatron-Core",
    )
    add_engine_argument(parser)


def add_engine_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that selects Transformer Engine for both sides."""
    text = "both sides use modules of Transformer Engine, with everything fused that they can fuse"
    parser.add_argument("--transformer-engine", action="store_true", help=text)


def fused_settings(transformer_engine: bool) -> dict[str, Any]:
    """Return the settings of the fastest modules that Megatron-Core has on this machine; a CPU fuses only activations.

    Args:
        transformer_engine: use Transformer Engine.
    """
    on_gpu = not cpu.is_installed()
    is_fused = on_gpu and transformer_engine
    packages = GpuPackages.installed() if is_fused else GpuPackages(False, False, False)
    settings = packages.argument_defaults()
    return settings | {
        "persist_layer_norm": not settings.pop("no_persist_layer_norm"),
        "gradient_accumulation_fusion": is_fused,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": on_gpu,
        "use_cpu_initialization": not on_gpu,
    }


def as_stock(config: TransformerConfig) -> TransformerConfig:
    """Return the settings of the stock side: Transformer Engine's router, which knows no mask, where it is fused."""
    config = copy(config)
    config.moe_router_fusion = config.moe_permute_fusion and moe_utils.fused_topk_with_score_function is not None
    return config


def with_main_grads(module: MegatronModule) -> DistributedDataParallel:
    """Wrap a module as production does: gradients are added to `main_grad` in fp32, and freed."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=True
    )
    return DistributedDataParallel(module.config, settings, module)


def configs(arguments: argparse.Namespace, num_ranks: int, **settings: Any) -> Iterator[TransformerConfig]:
    """Yield a configuration of one layer for each choice of K and N."""
    fused = fused_settings(arguments.transformer_engine)
    fused["bias_activation_fusion"] = settings.get("gated_linear_unit", False)  # Megatron fuses no GELU without bias
    for pair in arguments.experts:
        topk, num_experts = map(int, pair.split("/"))
        yield TransformerConfig(
            num_layers=1,
            hidden_size=arguments.hidden_size,
            num_attention_heads=4,
            num_moe_experts=num_experts,
            moe_router_topk=topk,
            moe_router_pre_softmax=topk == 1,
            moe_token_dispatcher_type="alltoall",
            expert_model_parallel_size=num_ranks,
            add_bias_linear=False,
            params_dtype=getattr(torch, arguments.dtype),
            **settings | fused,
        )


def let_one_rank_plan(visible_experts: VisibleExperts, mask: RoutingMask) -> None:
    """Add what `DispatchPlanner` reads, which `VisibleExperts` builds for several ranks only."""
    device = visible_experts.bit_values.device
    visible_experts.first_expert_of_row = torch.from_numpy(mask.first_visible()).to(device)
    visible_experts.num_visible_of_row = torch.from_numpy(mask.row_sizes.astype(np.int16)).to(device)


def draw_tokens(
    config: TransformerConfig,
    num_tokens: int,
    mask_name: str,
    groups: ProcessGroupCollection,
    dispatches_alone: bool = False,
) -> RoutedTokens:
    """Draw tokens that differ between ranks and are the same in every run.

    Args:
        config: the configuration of a layer.
        num_tokens: tokens of each rank.
        mask_name: one of `MASKS`, or `hash`: every id sees one expert.
        groups: the process groups.
        dispatches_alone: choose the way to dispatch for one rank as for several ranks.
    """
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    if mask_name == "hash":
        recipe = MaskRecipe.from_preset("hash-balanced", num_experts, 1)
    elif mask_name == "rank-local":
        recipe = MaskRecipe(
            num_experts=num_experts,
            num_layers=1,
            assignment="rank-local",
            frequent_mass=1.0,
            frequent_visible_experts=max(2, topk),
            expert_model_parallel_size=groups.ep.size(),
        )
    else:
        recipe = MaskRecipe.from_preset("smoe", num_experts, 1)
    mask = zipf_mask(recipe, VOCAB_SIZE)
    visible_experts = VisibleExperts(config, mask, groups).cuda()
    rng = np.random.default_rng(torch.distributed.get_rank())
    ids = torch.from_numpy(rng.choice(VOCAB_SIZE, (1, num_tokens), p=zipf_probabilities(VOCAB_SIZE))).cuda()
    hidden, gradient = torch.randn(2, num_tokens, 1, config.hidden_size, device=ids.device).to(config.params_dtype)
    kind = choose_dispatch(config, groups, visible_experts.is_rank_local)
    if dispatches_alone and groups.ep.size() == 1:
        if mask_name != "any":
            let_one_rank_plan(visible_experts, mask)
        kind = DispatchKind.ONE_COPY if mask_name == "any" else DispatchKind.PLANNED
    planner = DispatchPlanner(visible_experts, topk, [0], groups.ep) if kind is DispatchKind.PLANNED else None
    return RoutedTokens(hidden, gradient, ids, visible_experts, kind, planner)


def exchange_floor(hidden: Tensor, gradient: Tensor, group: ProcessGroup) -> Callable[[], None]:
    """Return the work of any exchange of one copy of each token: four all-to-alls, and a gather of rows with each.

    Tokens go to random ranks.

    Args:
        hidden: [tokens, hidden], sent in the forward pass.
        gradient: [tokens, hidden], sent in the backward pass.
        group: the ranks.
    """
    num_ranks = group.size()
    generator = torch.Generator().manual_seed(group.rank())
    destination = torch.randint(num_ranks, (len(hidden),), generator=generator).to(hidden.device)
    sent = destination.argsort()
    returned_to = sent.argsort()
    rows_to = torch.bincount(destination, minlength=num_ranks)
    rows_from = torch.empty_like(rows_to)
    torch.distributed.all_to_all_single(rows_from, rows_to, group=group)
    rows_to, rows_from = rows_to.tolist(), rows_from.tolist()

    def work() -> None:
        for values in (hidden, gradient):
            sending = values.index_select(0, sent)
            received = values.new_empty(sum(rows_from), values.shape[1])
            torch.distributed.all_to_all_single(received, sending, rows_from, rows_to, group=group)
            returned = torch.empty_like(values)
            torch.distributed.all_to_all_single(returned, received, rows_to, rows_from, group=group)
            returned.index_select(0, returned_to)

    return work
