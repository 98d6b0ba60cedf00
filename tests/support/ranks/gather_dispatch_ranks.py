"""Compare two ways to dispatch: `python gather_dispatch_ranks.py FOLDER MODULE`, with RANK and WORLD_SIZE set.

MODULE is a file that defines `GatherDispatcher`. The script fails if outputs or gradients of an MoE layer differ from
those with the layer's own dispatcher.
"""

import os
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from support.rank_program import run_as_rank
from support.small_moe import draw_parameters, make_config, make_layer, make_mask, random_visible_sets
from torch import Tensor

from maskmoe.transformer.dispatch.one_copy import OneCopyDispatcher
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

NUM_EXPERTS, VOCAB_SIZE, SEQUENCE, BATCH, HIDDEN = 6, 9, 6, 4, 8


def main() -> None:
    folder, module = Path(sys.argv[1]), Path(sys.argv[2])
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks
    )
    parallel_state.initialize_model_parallel(expert_model_parallel_size=num_ranks)
    model_parallel_cuda_manual_seed(1)
    mask = make_mask(random_visible_sets(5, 1, VOCAB_SIZE, NUM_EXPERTS, (1, 2, 3, 6)))
    layer = make_layer(make_config(NUM_EXPERTS, topk=2, expert_model_parallel_size=num_ranks), mask)
    draw_parameters(layer)

    torch.manual_seed(rank)
    token_ids = pack_token_ids(TokenIds(torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE))))
    hidden_states, gradient = torch.randn(2, SEQUENCE, BATCH, HIDDEN)

    def output_and_gradients() -> list[Tensor]:
        layer.zero_grad()
        input = hidden_states.clone().requires_grad_()
        output, _ = layer(input, padding_mask=token_ids)
        output.backward(gradient)
        return [output.detach(), input.grad, *(parameter.grad.clone() for parameter in layer.parameters())]

    assert isinstance(layer.dispatcher, OneCopyDispatcher)
    expected = output_and_gradients()
    gather = SourceFileLoader("gather", str(module)).load_module()
    layer.dispatcher = gather.GatherDispatcher(NUM_EXPERTS, torch.distributed.group.WORLD)
    for value, expected_value in zip(output_and_gradients(), expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=0, atol=0)


if __name__ == "__main__":
    run_as_rank(main)
