"""Compiles the kernels that a case launches for GPUs that are not there, and prints the kernels' names.

    python compile_kernels.py CASE

The process must not have TRITON_INTERPRET=1.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from support.kernels import compiled_launches

from maskmoe.megatron_compat import prepare_process


def copy_rows() -> None:
    """Launch the kernels of `SlottedCopies`."""
    from maskmoe.transformer.dispatch.rows import copies_of_map

    chosen = torch.ones(100, 40, dtype=torch.bool)
    for dtype in (torch.bfloat16, torch.float32):
        copies = copies_of_map(chosen, 800, 8, slice(8, 16))
        copies.sum_copies(copies.copy_rows(torch.ones(100, 64, dtype=dtype)))


def multiply_groups() -> None:
    """Launch the products of experts with and without tensor cores."""
    from maskmoe.transformer.kernels.grouped_linear import grouped_linear

    ends = torch.zeros(3, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        rows = torch.zeros(512, 72, dtype=dtype, requires_grad=True)
        weights = [torch.zeros(264, 72, dtype=dtype, requires_grad=True) for _ in range(3)]
        grouped_linear(rows, ends, weights).sum().backward()


def route() -> None:
    """Launch the kernels of the router for each score function, with and without optional arguments."""
    from maskmoe.transformer.kernels import routing
    from maskmoe.transformer.kernels.routing import RoutingRule, route_tokens
    from maskmoe.transformer.token_ids import TokenIds

    routing._BLOCK_SIZE = 128  # Small blocks compile faster.
    num_tokens, num_experts = 12, 8
    ids = torch.zeros(num_tokens // 2, 2, dtype=torch.int64)
    tables = torch.zeros(20, dtype=torch.int16), torch.zeros(70, 1, dtype=torch.uint8)
    plain = RoutingRule(4, "softmax", False, 1.0, 1, 0, True, False)
    full = RoutingRule(4, "sigmoid", False, 2.5, 4, 2, False, True)
    for rule, token_ids, expert_bias, dtype in (
        (plain, TokenIds(ids), None, torch.float32),
        (full, TokenIds(ids, ids > 0), torch.zeros(num_experts), torch.float32),
        (replace(full, score_function="sqrtsoftplus"), TokenIds(ids), None, torch.bfloat16),
    ):
        logits = torch.zeros(*ids.shape, num_experts, dtype=dtype, requires_grad=True)
        routed = route_tokens(logits, token_ids, *tables, rule, expert_bias, num_sequences=2, has_sums=True)
        assert routed.sums is not None
        (routed.probs.sum() + routed.sums.scores.sum() + routed.sums.z_terms.sum()).backward()
    rule = replace(plain, pre_softmax=True)
    route_tokens(logits, TokenIds(ids), *tables, rule, None, num_sequences=1, has_sums=False).probs.sum().backward()


CASES: dict[str, Callable[[], object]] = {
    "row copies": copy_rows,
    "grouped products": multiply_groups,
    "route": route,
}
"""Functions that launch kernels, by name. A case imports what it needs itself."""


if __name__ == "__main__":
    prepare_process()
    with compiled_launches() as names:
        CASES[sys.argv[1]]()
    print(*names)
