"""A layer computes while its tokens travel, and never reads rows that have not arrived."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from support import small_moe as moe
from support.launchers import RunRanks
from support.small_moe import DEVICE
from torch import Tensor

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

NUM_EXPERTS, VOCAB_SIZE = 6, 8


def late_all_to_all(output: Tensor, input: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
    """Replace torch's function; the received rows are NaN until they are waited for."""
    received = torch.empty_like(output)
    ALL_TO_ALL(received, input, *args, **kwargs)
    if not async_op:
        return output.copy_(received)
    output.fill_(torch.nan)
    return SimpleNamespace(wait=lambda: output.copy_(received))


ALL_TO_ALL = torch.distributed.all_to_all_single


def build_layer(kind: DispatchKind) -> MaskMoELayer:
    config = moe.make_config(
        NUM_EXPERTS,
        2,
        expert_model_parallel_size=2,
        moe_shared_expert_intermediate_size=10,
        moe_aux_loss_coeff=1e-2,
        moe_z_loss_coeff=1e-3,
    )
    layer = moe.make_layer(config, moe.make_mask(moe.visible_halves(VOCAB_SIZE, NUM_EXPERTS)))
    moe.draw_parameters(layer)
    layer.dispatcher = build_dispatcher(kind, layer, moe.process_groups())
    return layer


def run_layer(layer: MaskMoELayer) -> dict[str, Tensor]:
    """Return the output and all gradients."""
    draws = torch.Generator().manual_seed(torch.distributed.get_rank())
    hidden, gradient = torch.randn(2, 7, 2, 8, generator=draws).to(DEVICE)
    hidden.requires_grad_()
    token_ids = TokenIds(torch.randint(0, VOCAB_SIZE, (2, 7), generator=draws).to(DEVICE))
    layer.zero_grad()
    output, _ = layer(hidden, padding_mask=pack_token_ids(moe.plan_ids(layer, token_ids)))
    output.backward(gradient)
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "hidden": hidden.grad, **gradients}


def differences_of_rank() -> dict[str, list[str]]:
    """Return, for each kind of dispatch, what differs if the rows arrive as late as possible."""
    moe.initialize_parallelism(expert_model_parallel_size=2)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0, device=DEVICE))
    differing = {}
    for kind in (DispatchKind.PLANNED, DispatchKind.ONE_COPY):
        early = run_layer(build_layer(kind))
        torch.distributed.all_to_all_single = late_all_to_all
        late = run_layer(build_layer(kind))
        torch.distributed.all_to_all_single = ALL_TO_ALL
        differing[kind.name] = [name for name, value in early.items() if not torch.equal(value, late[name])]
    return differing


def test_late_rows_change_no_bit(run_ranks: RunRanks, tmp_path: Path) -> None:
    for differing in run_ranks(differences_of_rank, tmp_path):
        assert differing == {"PLANNED": [], "ONE_COPY": []}
