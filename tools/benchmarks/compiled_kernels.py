"""Print the kernels that inductor generates for the router's compiled functions, forward and backward, as JSON.

Inductor's C++ backend generates them, so no GPU is needed. The process must not have the CPU adapter, which leaves
compilation out.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch.utils._pytree import tree_leaves

from maskmoe.transformer.routing import LossRule, route_tokens, sum_for_losses
from maskmoe.transformer.selection import RoutingRule
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import MaskTable

_VOCAB_SIZE, _NUM_EXPERTS, _NUM_TOKENS = 40, 24, 13  # No two sizes are equal, or torch.compile takes them for one size.


def record_kernels() -> list[int]:
    """Return a list to which the compiler appends the number of kernels of each graph that it compiles from now on."""
    torch.compiler.reset()
    counts: list[int] = []

    def count(nodes: list[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
        launched = [node for node in nodes if not isinstance(node, NopKernelSchedulerNode)]
        counts.append(sum(not isinstance(node.node, MultiOutput) for node in launched))
        return nodes

    torch._inductor.config._post_fusion_custom_pass = count
    return counts


def count_kernels(function: Callable[..., Any], *arguments: Any, **settings: Any) -> int:
    """Compile a function of logits, ids, table and arguments; return the number of kernels of both passes."""
    counts = record_kernels()
    bits = torch.randint(1, 256, (_VOCAB_SIZE, _NUM_EXPERTS // 8)).byte()
    row_of_id, bit_values = torch.arange(_VOCAB_SIZE).short(), (1 << torch.arange(8)).byte()
    table = MaskTable(row_of_id, bits, bit_values, _NUM_EXPERTS, has_single=False)
    ids = TokenIds(torch.randint(0, _VOCAB_SIZE, (_NUM_TOKENS, 1)))
    logits = torch.randn(_NUM_TOKENS, 1, _NUM_EXPERTS, requires_grad=True)
    results = torch.compile(function, dynamic=True)(logits, ids, table, *arguments, **settings)
    outputs = [each for each in tree_leaves(results) if isinstance(each, Tensor) and each.requires_grad]
    torch.autograd.backward(outputs, [torch.rand_like(output) for output in outputs])
    return sum(counts)


def main() -> None:
    torch._inductor.config.fx_graph_cache = False  # A graph from the cache is not scheduled, so it has no count.
    torch._inductor.config.cpp.simdlen = 1  # Plain loops compile faster than vectorized ones.
    rule, losses = RoutingRule(2), LossRule(("aux_loss",), "all", has_z_loss=False)
    counted = {"has_statistics": True, "expert_bias": None}
    kernels = {
        "route_tokens": count_kernels(route_tokens, rule, losses, **counted),
        "route_tokens without losses": count_kernels(route_tokens, rule, None, **counted),
        "sum_for_losses": count_kernels(sum_for_losses, rule, losses),
    }
    print(json.dumps(kernels))


if __name__ == "__main__":
    main()
