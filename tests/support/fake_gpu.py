"""Runs routing, plans and copies of rows on tensors of a GPU without storage: `fake_gpu.py PLACE…`.

torch's `FakeTensorMode` raises an error where an operation mixes devices or reads a value. PLACE is the device of token
ids and routing map: `cuda`, or `cpu` for the counterproof. Prints one JSON object for each place: for each piece of
work the devices of its results, or `mixed`. There is no backward pass, which needs a GPU's driver.
The process must not have the CPU adapter, which would put the tensors on the CPU.
"""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from support.compile_routing import CASES, NUM_EXPERTS, VOCAB_SIZE, Case, random_table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from zipf import zipf_mask

from maskmoe.routing_mask.assignment import MaskRecipe
from maskmoe.transformer.dispatch.planned import DispatchPlanner
from maskmoe.transformer.dispatch.rows import CopyToExperts, RowCopies, RowExchange
from maskmoe.transformer.routing import route_tokens
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import VisibleExperts

TOKENS, HIDDEN, RANKS = 12, 16, 2


def draw_ids(place: str) -> TokenIds:
    """Return ids and padding [batch, sequence]."""
    ids = torch.zeros(2, TOKENS // 2, dtype=torch.int64, device=place)
    return TokenIds(ids, torch.zeros_like(ids, dtype=torch.bool))


def route(case: Case, place: str) -> Any:
    """Route tokens with the options of a case."""
    table = random_table(torch.Generator())
    table = type(table)(*(part.to("cuda") if isinstance(part, Tensor) else part for part in table))
    logits = torch.zeros(TOKENS // 2, 2, NUM_EXPERTS, device="cuda", dtype=case.dtype)
    expert_bias = torch.zeros(NUM_EXPERTS, device="cuda") if case.has_bias else None
    ids = draw_ids(place).transpose()
    return tuple(route_tokens(logits, ids, table, case.rule, case.losses, case.losses is not None, expert_bias))


def plan(place: str) -> Any:
    """Plan a micro-batch under a rank-local mask."""
    sizes = {"num_experts": NUM_EXPERTS, "num_layers": 1, "expert_model_parallel_size": RANKS}
    mask = zipf_mask(
        MaskRecipe(assignment="rank-local", frequent_mass=0.5, frequent_visible_experts=4, **sizes), VOCAB_SIZE
    )
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=NUM_EXPERTS,
        expert_model_parallel_size=RANKS,
        add_bias_linear=False,
    )
    visible_experts = VisibleExperts(config, mask, SimpleNamespace()).to("cuda")
    planner = DispatchPlanner(visible_experts, 2, [0], torch.distributed.group.WORLD)
    counts = [TOKENS // RANKS] * 2 * RANKS + [TOKENS]
    # A tensor without storage has no numbers to read.
    with patch.object(FakeTensor, "tolist", lambda tensor: [counts]):
        made = planner.plan(draw_ids(place))[0]
    return vars(made.to_ranks), made.received_ids, made.received_padding


def copy_rows(place: str) -> Any:
    """Send rows to ranks and to experts, and back."""
    chosen = torch.zeros(TOKENS, NUM_EXPERTS, dtype=torch.bool, device=place)
    to_ranks = RowCopies.from_map(chosen[:, :RANKS], TOKENS)
    shares = (TOKENS // RANKS,) * RANKS
    exchange = RowExchange(torch.distributed.group.WORLD, to_ranks, shares, shares)
    hidden = torch.zeros(TOKENS, HIDDEN, device="cuda")
    weights = torch.zeros(TOKENS, NUM_EXPERTS, device="cuda")
    sent = exchange.dispatch(hidden)
    copy_to_experts = CopyToExperts(slice(0, NUM_EXPERTS // RANKS), uses_transformer_engine=False)
    rows = copy_to_experts(sent.receive(sent.rows), weights, chosen, 2 * TOKENS)
    output = exchange.combine(rows.sum_outputs(rows.values * rows.weights.unsqueeze(1)))
    return vars(to_ranks), rows.values, rows.weights, output


def devices_of(work: Callable[..., Any], *arguments: Any) -> str:
    """Return the devices of the tensors that some work returns, or `mixed` if an operation mixes devices."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            tensors = [leaf for leaf in tree_leaves(work(*arguments)) if isinstance(leaf, Tensor)]
    except FakeTensorDeviceMismatchError:
        return "mixed"
    return ", ".join(sorted({tensor.device.type for tensor in tensors}))


if __name__ == "__main__":
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    for place in sys.argv[1:]:
        found = {f"route: {name}": devices_of(route, case, place) for name, case in CASES.items()}
        print(json.dumps(found | {work.__name__: devices_of(work, place) for work in (plan, copy_rows)}))
