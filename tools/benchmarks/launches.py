"""Count what an MoE layer launches on a GPU, forward and backward, without a GPU; experts do nothing.

Both sides run on a CPU over gloo with the branches of a GPU with Transformer Engine:

- A fused function of Transformer Engine counts as the kernels that version 2.20 launches for it; plain torch computes
  its result.
- A function that `torch.compile` compiles on a GPU counts as the kernels that `compiled_kernels.py` counts.
- Every other operation of torch counts as one launch, and so does a collective. Copies between host and device are not
  counted.

    torchrun --standalone --nproc-per-node 2 tools/benchmarks/launches.py
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import routed_tokens
import torch
from megatron.core.transformer.moe import moe_utils, router, token_dispatcher
from meter import cost_of
from moe_layer import LAYER_SETTINGS, build_layers, compute
from ranks import join_ranks
from routed_tokens import draw_tokens
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from maskmoe.transformer import router as our_router
from maskmoe.transformer.dispatch import rows
from maskmoe.transformer.routing import route_tokens, sum_for_losses
from maskmoe.transformer.token_ids import pack_token_ids

# The kernels of both passes: transformer_engine/pytorch/permutation.py and router.py. A permutation launches three for
# the map of rows, and sorting of chunks one.
_FUSED = {
    (token_dispatcher, "permute"): 5,
    (token_dispatcher, "unpermute"): 2,
    (token_dispatcher, "sort_chunks_by_idxs"): 3,
    (router, "topk_routing_with_score_function"): 2,
    (router, "compute_routing_scores_for_aux_loss"): 2,
    (router, "switch_load_balancing_loss_func"): 2,
}


class UncountedOperations(torch.autograd.Function):
    """Runs a function forward and backward without the modes that count."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., list[Tensor]], *inputs: Tensor) -> tuple[Tensor, ...]:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.enable_grad():
            ctx.inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            ctx.outputs = run(*ctx.inputs)
            results = tuple(output.detach() for output in ctx.outputs)
        ctx.mark_non_differentiable(
            *(result for result, output in zip(results, ctx.outputs, strict=True) if not output.requires_grad)
        )
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            pairs = [pair for pair in zip(ctx.outputs, gradients, strict=True) if pair[0].requires_grad]
            outputs, own_gradients = zip(*pairs, strict=True)
            return None, *torch.autograd.grad(outputs, ctx.inputs, own_gradients, allow_unused=True)


class Launches:
    """Counts the kernels of functions whose operations are not counted.

    Attributes:
        count: the kernels of both passes of all calls.
    """

    def __init__(self) -> None:
        self.count = 0

    def counting(self, function: Callable[..., Any], kernels: int) -> Callable[..., Any]:
        """Return the function, each call of which counts as a number of kernels."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += kernels
            if "fused" in kwargs:
                kwargs["fused"] = False
            leaves, form = tree_flatten((args, kwargs))
            differentiable = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
            results, result_form = list[Any](), None

            def run(*inputs: Tensor) -> list[Tensor]:
                nonlocal results, result_form
                for i, tensor in zip(differentiable, inputs, strict=True):
                    leaves[i] = tensor
                own_args, own_kwargs = tree_unflatten(leaves, form)
                results, result_form = tree_flatten(function(*own_args, **own_kwargs))
                return [result for result in results if isinstance(result, Tensor)]

            outputs = iter(UncountedOperations.apply(run, *(leaves[i] for i in differentiable)))
            return tree_unflatten(
                [next(outputs) if isinstance(result, Tensor) else result for result in results], result_form
            )

        return call


class NoExperts(torch.nn.Module):
    """Weighs the rows, and computes nothing else."""

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        return (rows * weights.unsqueeze(-1)).to(rows.dtype), None


@contextmanager
def gpu_branches(launches: Launches) -> Iterator[None]:
    """Take the branches of a GPU with Transformer Engine, and count its fused and compiled functions."""
    script = Path(__file__).with_name("compiled_kernels.py")
    kernels = json.loads(subprocess.run([sys.executable, script], stdout=subprocess.PIPE, check=True).stdout)
    permute, unpermute = moe_utils.permute, moe_utils.unpermute

    def permute_with_probs(tokens: Tensor, probs: Tensor, chosen: Tensor, num_out_tokens: int) -> tuple:
        return permute(tokens, chosen, probs=probs, num_out_tokens=num_out_tokens)[:3]

    def unpermute_rows(tokens: Tensor, row_id_map: Tensor, restore_shape: torch.Size) -> Tensor:
        return unpermute(tokens, row_id_map, restore_shape)

    def route(*args: Any, **kwargs: Any) -> Any:
        name = "route_tokens" if args[4] else "route_tokens without losses"
        return launches.counting(route_tokens, kernels[name])(*args, **kwargs)

    with ExitStack() as stack:
        for (module, name), number in _FUSED.items():
            replacement = launches.counting(getattr(module, name), number)
            stack.enter_context(patch.object(module, name, replacement))
        for module, replacements in (
            (
                moe_utils,
                {
                    "fused_permute_with_probs": launches.counting(permute_with_probs, 5),
                    "fused_unpermute": launches.counting(unpermute_rows, 2),
                    "fused_topk_with_score_function": route,  # Only whether it exists is asked.
                },
            ),
            (
                our_router,
                {
                    "_route_tokens": route,
                    "_sum_for_losses": launches.counting(sum_for_losses, kernels["sum_for_losses"]),
                },
            ),
            (rows, {"_is_on_cpu": lambda tensor: False}),
        ):
            stack.enter_context(patch.multiple(module, **replacements))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    routed_tokens.add_arguments(parser)
    parser.set_defaults(experts=["2/16"], dtype="bfloat16", tokens=256, hidden_size=64)
    arguments = parser.parse_args()
    groups, launches, lines = join_ranks(), Launches(), list[str]()
    with gpu_branches(launches):
        for config in routed_tokens.configs(arguments, groups.ep.size(), moe_ffn_hidden_size=8, **LAYER_SETTINGS):
            config.moe_permute_fusion = True
            for mask in routed_tokens.MASKS:
                tokens = draw_tokens(config, arguments.tokens, mask, groups, arguments.dispatches_alone)
                ours, stock = build_layers(config, tokens, groups)
                token_ids = tokens.plan_ids()
                works = {tokens.kind.name.lower(): (ours, pack_token_ids(token_ids)), "stock": (stock, None)}
                costs = {"its plan, once a micro-batch": cost_of(tokens.plan_ids)} if token_ids.plan else {}
                for name, (layer, padding_mask) in works.items():
                    layer.experts = NoExperts()
                    work = compute(layer, tokens, lambda padding_mask=padding_mask: padding_mask)
                    work()
                    launches.count = 0
                    cost = cost_of(work)
                    costs[name] = replace(cost, launches=cost.launches + launches.count)
                for name, cost in costs.items():
                    collectives = cost.all_to_alls + cost.other_collectives
                    lines.append(f"{mask} | {name} | {cost.launches} | {collectives} | {cost.host_waits}")
    if torch.distributed.get_rank() == 0:
        print("\n".join(("mask | dispatch | launches | collectives among them | host waits", *lines)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
