"""Compiles the kernels that a case launches for GPUs that are not there, and prints the kernels' names.

    python compile_kernels.py CASE

The process must not have TRITON_INTERPRET=1.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

from support.kernels import compiled_launches


def route() -> None:
    """Launch the kernels of the router for each score function, with and without optional arguments."""
    import torch

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


CASES: dict[str, Callable[[], object]] = {"route": route}
"""Functions that launch kernels, by name. A case imports what it needs itself."""


if __name__ == "__main__":
    with compiled_launches() as names:
        CASES[sys.argv[1]]()
    print(*names)
