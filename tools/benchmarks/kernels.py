"""Count the CUDA kernels and host waits of the parts of an MoE layer by the profiler, on one rank or several.

Ours and Megatron-Core's layer are built of the same modules. On one rank, our layers dispatch as on several. Without a
GPU, all counts are 0; `operations.py` counts without a GPU.

    python tools/benchmarks/kernels.py --dtype bfloat16
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import routed_tokens
import torch
from device_meter import DeviceCost, device_cost_of
from megatron.core.process_groups_config import ProcessGroupCollection
from moe_layer import LAYER_SETTINGS, build_layers
from ranks import join_ranks
from routed_tokens import draw_tokens
from torch import Tensor

from maskmoe.transformer.token_ids import TokenIds, pack_token_ids


@dataclass(frozen=True)
class PartCost:
    """The costs of one part of a layer: of its forward and of its backward pass, if there is one."""

    forward: DeviceCost
    backward: DeviceCost


def measure(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> PartCost:
    """Measure a function of hidden states [tokens, 1, hidden]."""

    def run() -> Tensor:
        return forward(hidden.detach().requires_grad_())

    def backward(output: Tensor) -> None:
        output.backward(torch.ones_like(output))

    outputs = [run(), run()]  # `device_cost_of` works twice.
    return PartCost(device_cost_of(run), device_cost_of(lambda: backward(outputs.pop())))


def measure_all(arguments: argparse.Namespace, groups: ProcessGroupCollection) -> dict[str, PartCost]:
    """Measure the parts of layers of the first configuration, by name."""
    settings = LAYER_SETTINGS | {"moe_ffn_hidden_size": arguments.ffn_hidden_size}
    config = next(routed_tokens.configs(arguments, groups.ep.size(), **settings))
    found = {}
    for name, mask_name in (("planned", "rank-local"), ("one copy", "any")):
        tokens = draw_tokens(config, arguments.tokens, mask_name, groups, dispatches_alone=True)
        ours, stock = build_layers(config, tokens, groups)
        token_ids, ids = tokens.plan_ids(), TokenIds(tokens.ids).transpose()
        packed = pack_token_ids(token_ids)
        parts: dict[str, Callable[[Tensor], Tensor]] = {
            f"layer, {name}": lambda hidden, layer=ours, packed=packed: layer(hidden, padding_mask=packed)[0],
            f"router, {name}": lambda hidden, router=ours.router, ids=ids: router(hidden, ids)[0],
            "layer of Megatron-Core": lambda hidden, layer=stock: layer(hidden)[0],
            "router of Megatron-Core": lambda hidden, router=stock.router: router(hidden)[0],
        }
        found |= {part: measure(forward, tokens.hidden) for part, forward in parts.items()}
        if tokens.planner is not None:
            found["plan of a micro-batch"] = PartCost(device_cost_of(tokens.plan_ids), DeviceCost())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    routed_tokens.add_arguments(parser)
    parser.add_argument("--ffn-hidden-size", type=int, default=512, help="width of an expert (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="also write the counts to this file")
    arguments = parser.parse_args()
    found = measure_all(arguments, join_ranks())
    if torch.distributed.get_rank() == 0:
        for name, cost in found.items():
            print(f"{name}: forward {cost.forward}; backward {cost.backward}")
        if arguments.json:
            arguments.json.write_text(json.dumps({name: asdict(cost) for name, cost in found.items()}, indent=2) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
