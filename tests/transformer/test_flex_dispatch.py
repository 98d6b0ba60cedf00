"""The flex dispatcher with a stand-in for DeepEP; the real library needs GPUs."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import small_moe as moe
from support import stub_deepep
from support.launchers import RunRanks
from torch import Tensor

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

NUM_EXPERTS, TOPK, VOCAB_SIZE, SEQUENCE, BATCH, HIDDEN = 8, 3, 9, 12, 4, 16
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
# Number of visible experts, factor of the router's weights, and settings. A large factor rounds weights of selected
# experts to 0. With a capacity, some tokens keep no expert.
CASES: dict[str, tuple[int, float, dict[str, Any]]] = {
    "softmax": (NUM_EXPERTS, 1, {}),
    "weights of 0": (NUM_EXPERTS, 1000, SIGMOID),
    "last rank starves": (4, 1, {}),
    "capacity": (NUM_EXPERTS, 1, {"moe_expert_capacity_factor": 0.3}),
}


def run(case: str, flex: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return output and gradients, the routing map, and the rows of the local experts."""
    num_visible, scale, settings = CASES[case]
    if flex:
        settings = settings | {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    visible = np.zeros((1, VOCAB_SIZE, NUM_EXPERTS), bool)
    visible[..., :num_visible] = moe.random_visible_sets(5, 1, VOCAB_SIZE, num_visible, (1, 2, 3))
    config = moe.make_config(NUM_EXPERTS, TOPK, hidden_size=HIDDEN, expert_model_parallel_size=2, **settings)
    layer: MaskMoELayer = moe.make_layer(config, moe.make_mask(visible))
    rank = torch.distributed.get_rank()
    moe.draw_parameters(layer)
    with torch.no_grad():
        layer.router.weight.mul_(scale)
        for parameter in layer.experts.parameters():
            parameter.mul_(1 + rank / 8)
    if not flex:
        layer.dispatcher = build_dispatcher(DispatchKind.ONE_COPY, layer, moe.process_groups())
    routed, rows = [], []
    layer.router.register_forward_hook(lambda module, inputs, output: routed.append(output[1]))
    layer.experts.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[1]))
    torch.manual_seed(rank)
    token_ids = pack_token_ids(TokenIds(torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE))))
    hidden, gradient = torch.randn(2, SEQUENCE, BATCH, HIDDEN)
    output, _ = layer(hidden.requires_grad_(), padding_mask=token_ids)
    output.backward(gradient)
    return [output.detach(), hidden.grad, *(parameter.grad for parameter in layer.parameters())], routed[0], rows[0]


def compare_on_rank() -> None:
    stub_deepep.install()
    moe.initialize_parallelism(expert_model_parallel_size=2)
    for case in CASES:
        expected, _, _ = run(case, flex=False)
        found, routing_map, rows = run(case, flex=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda text, case=case: f"{case}: {text}")
        selected = routing_map.sum(dim=0)
        torch.distributed.all_reduce(selected)
        assert torch.equal(rows, selected.chunk(2)[torch.distributed.get_rank()])
        assert (routing_map.sum(dim=1) == 0).any() == (case == "capacity")


def test_flex_dispatch_equals_one_copy_dispatch(tmp_path: Path, run_ranks: RunRanks) -> None:
    run_ranks(compare_on_rank, tmp_path)
