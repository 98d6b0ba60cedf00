"""Compiles the routing of tokens: `compiled_routing.py BACKEND CASE…`.

Prints one JSON object for each case. BACKEND is a backend of `torch.compile`, whose results are compared with the eager
function's; `cuda`, whose kernels are counted; or `ptxas`, which also assembles the kernels. The process must not have
the CPU adapter, which leaves compilation out.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from maskmoe.transformer.routing import LossRule, route_tokens
from maskmoe.transformer.selection import RoutingRule
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import MaskTable

# No two sizes are equal: torch.compile takes equal sizes for one size, and compiles again when they differ.
VOCAB_SIZE, NUM_EXPERTS = 40, 24
ALL_LOSSES = LossRule(("aux_loss", "seq_aux_loss", "global_aux_loss"), "routable", has_z_loss=True)


@dataclass(frozen=True)
class Case:
    """One setting of a router, and the batches that it routes one after the other.

    Attributes:
        rule: The settings of the router.
        losses: The losses; None in evaluation.
        has_bias: Whether the router has an expert bias.
        has_padding: Whether some tokens are padding.
        shapes: [sequence, batch] of each batch.
        dtype: The dtype of the logits.
    """

    rule: RoutingRule
    losses: LossRule | None = ALL_LOSSES
    has_bias: bool = False
    has_padding: bool = False
    shapes: tuple[tuple[int, int], ...] = ((7, 2), (9, 5))
    dtype: torch.dtype = torch.float32


_GROUPS = {"num_groups": 4, "group_topk": 2}
_FULLEST = RoutingRule(4, "sigmoid", scaling_factor=2.5, **_GROUPS)

CASES = {
    "usual": Case(RoutingRule(2), LossRule(("aux_loss",), "all", has_z_loss=True)),
    "everything": Case(_FULLEST, has_bias=True, has_padding=True),
    "evaluation": Case(RoutingRule(2), losses=None),
    "laptop": Case(RoutingRule(1, pre_softmax=True), LossRule(("aux_loss",), "all", has_z_loss=False)),
    "softmax before": Case(RoutingRule(1, pre_softmax=True)),
    "softmax after": Case(RoutingRule(4), has_padding=True),
    "softmax, groups": Case(RoutingRule(4, pre_softmax=True, **_GROUPS)),
    "sigmoid": Case(RoutingRule(4, "sigmoid"), LossRule(("aux_loss",), "all", has_z_loss=False)),
    "sqrtsoftplus": Case(RoutingRule(4, "sqrtsoftplus"), has_bias=True),
    "bfloat16": Case(RoutingRule(4, "sigmoid"), dtype=torch.bfloat16),
}


def random_table(generator: torch.Generator) -> MaskTable:
    """Draw a table in which every third id sees one expert."""
    singles = torch.eye(NUM_EXPERTS, dtype=torch.int64)
    visible = torch.randint(0, 2, (VOCAB_SIZE, NUM_EXPERTS), generator=generator).index_fill(1, torch.tensor([0, 9]), 1)
    bit_values = 1 << torch.arange(8)
    visible_bits = (torch.cat([singles, visible]).unflatten(1, (-1, 8)) * bit_values).sum(dim=2)
    row_of_id = NUM_EXPERTS + torch.arange(VOCAB_SIZE)
    row_of_id[::3] = torch.arange(len(row_of_id[::3]))
    return MaskTable(row_of_id.short(), visible_bits.byte(), bit_values.byte(), NUM_EXPERTS, has_single=True)


def difference(ours: Any, expected: Any) -> float:
    """Return the largest difference of the tensors of two results, relative to the largest value of each tensor."""
    largest = 0.0
    for one, other in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        if isinstance(other, Tensor):
            assert one.shape == other.shape
            if other.numel():
                error = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1)
                largest = max(largest, error.item())
        else:
            assert one == other
    return largest


def run(case: Case, backend: str) -> dict[str, Any]:
    """Route all batches of a case both ways."""
    counters.clear()
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    table = random_table(generator)
    expert_bias = torch.randn(NUM_EXPERTS, generator=generator) if case.has_bias else None
    compiled = torch.compile(route_tokens, dynamic=True, fullgraph=True, backend=backend)
    largest = 0.0
    for sequence, batch in case.shapes:
        logits = torch.randn(sequence, batch, NUM_EXPERTS, generator=generator).to(case.dtype)
        ids = torch.randint(0, VOCAB_SIZE, (batch, sequence), generator=generator).t()  # strides as in a model
        is_padding = torch.rand(batch, sequence, generator=generator).t() < 0.4 if case.has_padding else None
        results = []
        for route in (compiled, route_tokens):
            own_logits = logits.clone().requires_grad_(case.losses is not None)
            with torch.set_grad_enabled(case.losses is not None):
                routed = route(
                    own_logits,
                    TokenIds(ids, is_padding),
                    table,
                    case.rule,
                    case.losses,
                    has_statistics=case.losses is not None,
                    expert_bias=expert_bias,
                )
                if case.losses is not None:
                    leaves = tree_leaves((routed.probs, routed.loss_sums))
                    outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
                    seeds = [torch.linspace(-1, 1, each.numel()).view_as(each).to(each) for each in outputs]
                    torch.autograd.backward(outputs, seeds)
            results.append((tuple(routed), own_logits.grad))
        (ours, our_grad), (expected, expected_grad) = results
        # The order among equal scores is open, so compare the selection by the routing map.
        ours, expected = ((*each[:2], *each[3:]) for each in (ours, expected))
        assert torch.equal(ours[1], expected[1])
        largest = max(largest, difference((*ours, our_grad), (*expected, expected_grad)))
    return {
        "difference": largest,
        "compilations": counters["stats"]["unique_graphs"],
        "graph_breaks": len(counters["graph_break"]),
    }


def count_kernels(case: Case, assembles: bool) -> dict[str, Any]:
    """Count the kernels of the forward and the backward pass on a GPU; assemble the kernels if asked to."""
    from support.cuda_code import assemble, cuda_code

    generator = torch.Generator().manual_seed(0)
    sequence, batch, needs_gradient = 4091, 1, case.losses is not None
    passes = cuda_code(
        route_tokens,
        torch.randn(sequence, batch, NUM_EXPERTS, dtype=case.dtype, requires_grad=needs_gradient),
        TokenIds(torch.zeros(batch, sequence, dtype=torch.int64).t()),
        random_table(generator),
        case.rule,
        case.losses,
        has_statistics=True,
        expert_bias=torch.zeros(NUM_EXPERTS) if case.has_bias else None,
    )
    if assembles:
        for name, source in (kernel for code in passes for kernel in code.kernels()):
            assemble(name, source)
    return {"kernels": [code.num_kernels for code in passes]}


if __name__ == "__main__":
    torch._inductor.config.fx_graph_cache = False  # A graph from the cache is not scheduled, so it has no count.
    torch._inductor.config.cpp.simdlen = 1  # Plain loops compile faster than vectorized ones.
    backend, *names = sys.argv[1:]
    for name in names:
        counts = backend in ("cuda", "ptxas")
        found = count_kernels(CASES[name], backend == "ptxas") if counts else run(CASES[name], backend)
        print(json.dumps(found), flush=True)
