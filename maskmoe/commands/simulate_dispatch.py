"""Compare ways to dispatch tokens to experts on 8 to thousands of GPUs, without any.

Takes real token ids and a routing mask, lets a random choice among the experts that each id sees stand for the router,
and counts the hidden states that expert-parallel ranks would send each other: for the same choice exactly those that
Megatron's and MaskMoE's dispatchers put into their all-to-alls. A model of the network gives the time.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from maskmoe.cli import atomic_output
from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.errors import UserError
from maskmoe.routing_mask import RoutingMask, TokenFrequency, count_token_frequency
from maskmoe.simulation import Cluster, Layout, Link, MicroBatches, Simulation, Workload
from maskmoe.simulation.report import draw_plot, table, to_json

_NUM_GPUS = tuple(1 << exponent for exponent in range(3, 13))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""example:
  python tools/simulate_dispatch.py --data-path data/web_text_document --routing-mask mask.safetensors \\
    --topk 8 --hidden-size 4096 --expert-model-parallel-size 64 --output dispatch.json --plot dispatch.png

compared are top-k routing over all experts, the given mask, and masks made for the ranks from the frequencies of the
data: rank-local, with all experts of an id on one rank, and node-local, on one node. Either a row is sent for every
selected expert, as by Megatron, or one copy for every rank that has any. Where a variant cannot be, the table says why.

columns of the table:
  own, node, across  what a rank sends itself, its node and other nodes in a layer and step, forward and backward (mean)
  rows               hidden states that a rank receives in one all-to-all (mean)
  load               tokens × experts of the busiest rank over the mean: by the ids' frequencies, and of these tokens
  all-to-all         time of one all-to-all of hidden states; a layer and step has four
  layer              time of all that a layer sends in a step""",
    )
    source = parser.add_argument_group("what is routed")
    source.add_argument("--data-path", required=True, metavar="P", help="prefix of a dataset; P.bin and P.idx exist")
    source.add_argument(
        "--routing-mask", type=Path, required=True, metavar="F", help="from tools/build_routing_mask.py"
    )
    source.add_argument(
        "--layer", type=int, metavar="L", help="layer of the mask, from 1 on (default: the mean of all layers)"
    )
    source.add_argument(
        "--tokens-per-rank",
        type=int,
        default=4096,
        metavar="T",
        help="consecutive tokens in a rank's micro-batch, each rank's from another place (default: %(default)s)",
    )
    source.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the choice of experts (default: %(default)s)"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--topk", type=int, nargs="+", required=True, metavar="K", help="experts of a token; several to compare"
    )
    model.add_argument("--hidden-size", type=int, required=True, metavar="H", help="elements of a hidden state")
    model.add_argument(
        "--bytes-per-element", type=int, default=2, metavar="B", help="of hidden states (default: %(default)s, bf16)"
    )

    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--num-gpus",
        type=int,
        nargs="+",
        default=_NUM_GPUS,
        metavar="G",
        help="numbers to compare (default: 8 to 4096)",
    )
    cluster.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="(default: %(default)s)")
    cluster.add_argument(
        "--expert-model-parallel-size",
        type=int,
        metavar="E",
        help="expert-parallel ranks of a group, or all GPUs where there are fewer (default: all GPUs)",
    )
    for where, what, bandwidth, latency in (
        ("intra", "within a node", 450, 1),
        ("inter", "to other nodes", 50, 2),
    ):
        cluster.add_argument(
            f"--{where}-node-bandwidth",
            type=float,
            default=bandwidth,
            metavar="GB/s",
            help=f"of each GPU {what}, in each direction (default: %(default)s)",
        )
        cluster.add_argument(
            f"--{where}-node-latency",
            type=float,
            default=latency,
            metavar="µs",
            help=f"that each message {what} takes beside its bytes (default: %(default)s)",
        )

    parser.add_argument(
        "--output", type=Path, metavar="F", help="file to write the results to, in bytes and seconds, .json"
    )
    parser.add_argument("--plot", type=Path, metavar="F", help="file to draw them in, .png")
    return parser.parse_args()


def layouts_from(arguments: argparse.Namespace) -> list[Layout]:
    """The ranks of each number of GPUs, ascending. Raises UserError where there can be none."""
    ep_size, all_num_gpus = arguments.expert_model_parallel_size, sorted(set(arguments.num_gpus))
    ep_sizes = all_num_gpus if ep_size is None else [min(num_gpus, ep_size) for num_gpus in all_num_gpus]
    return [Layout(*sizes, arguments.gpus_per_node) for sizes in zip(all_num_gpus, ep_sizes, strict=True)]


def layers_from(arguments: argparse.Namespace, mask: RoutingMask) -> Sequence[int]:
    """The layers to simulate, from 0 on. Raises UserError where the mask does not have them."""
    if arguments.layer is None:
        return range(mask.num_layers)
    if not 1 <= arguments.layer <= mask.num_layers:
        raise UserError(f"--layer is {arguments.layer}; the routing mask has layers 1 to {mask.num_layers}")
    return [arguments.layer - 1]


def cluster_from(arguments: argparse.Namespace) -> Cluster:
    """The links. Raises UserError where one is impossible."""
    return Cluster(
        within=Link(arguments.intra_node_bandwidth * 1e9, arguments.intra_node_latency * 1e-6),
        across=Link(arguments.inter_node_bandwidth * 1e9, arguments.inter_node_latency * 1e-6),
    )


def count_frequency(data_path: str, mask: RoutingMask, mask_path: Path) -> TokenFrequency:
    """Counts of the dataset's ids. Raises UserError where the mask is for another vocabulary."""
    try:
        return count_token_frequency([data_path], mask.vocab_size, progress=True)
    except UserError as error:
        raise UserError(f"routing mask {mask_path} has {mask.vocab_size:,} ids and does not fit: {error}") from error


def settings_of(arguments: argparse.Namespace, mask: RoutingMask, num_tokens: int) -> dict[str, Any]:
    """What decides the results, as JSON values."""
    flags = {name: value for name, value in vars(arguments).items() if name not in ("output", "plot")}
    flags["routing_mask"] = str(arguments.routing_mask)
    return flags | {"routing_mask_digest": mask.digest, "num_experts": mask.num_experts, "dataset_tokens": num_tokens}


def print_settings(
    arguments: argparse.Namespace, mask: RoutingMask, batches: MicroBatches, layouts: Sequence[Layout]
) -> None:
    num_visible = mask.num_visible
    is_frequent = num_visible > 1
    sees = f"; {is_frequent.sum():,} of them see {num_visible.max()}" if is_frequent.any() else ""
    print(f"dataset          {arguments.data_path}: {len(batches.tokens):,} tokens")
    if overlapping := [layout.num_gpus for layout in layouts if batches.overlap(layout.num_gpus)]:
        print(f"                 from {overlapping[0]:,} GPUs on, ranks share some of them")
    print(f"mask             {mask.vocab_size:,} ids{sees} · {mask.num_experts:,} experts · layers: {mask.num_layers}")
    print(
        f"micro-batch      {batches.tokens_per_rank:,} tokens a rank, "
        f"each of {arguments.hidden_size:,} × {arguments.bytes_per_element} bytes"
    )
    print(
        f"links of a GPU   in its node {arguments.intra_node_bandwidth:g} GB/s and {arguments.intra_node_latency:g} µs "
        f"a message, to other nodes {arguments.inter_node_bandwidth:g} GB/s and {arguments.inter_node_latency:g} µs"
    )
    print(f"nodes            {arguments.gpus_per_node} GPUs each\n")


def main() -> None:
    arguments = parse_arguments()
    if arguments.seed < 0:
        raise UserError(f"--seed must not be negative, it is {arguments.seed}")
    layouts, cluster = layouts_from(arguments), cluster_from(arguments)
    mask = RoutingMask.load(arguments.routing_mask)
    layers = layers_from(arguments, mask)
    workload = Workload(
        topks=tuple(sorted(set(arguments.topk))),
        tokens_per_rank=arguments.tokens_per_rank,
        hidden_size=arguments.hidden_size,
        bytes_per_element=arguments.bytes_per_element,
        num_experts=mask.num_experts,
        num_layers=mask.num_layers,
    )
    batches = MicroBatches(open_tokens(arguments.data_path), arguments.tokens_per_rank)
    with ExitStack() as outputs:
        output = arguments.output and outputs.enter_context(atomic_output(arguments.output))
        plot = arguments.plot and outputs.enter_context(atomic_output(arguments.plot))
        frequency = count_frequency(arguments.data_path, mask, arguments.routing_mask)
        simulation = Simulation(mask, layers, frequency, batches, cluster, workload, arguments.seed)
        results = simulation.run(layouts, progress=True)
        if output:
            content = to_json(settings_of(arguments, mask, len(batches.tokens)), results)
            output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if plot:
            draw_plot(results, plot)
    print_settings(arguments, mask, batches, layouts)
    print(*table(results), sep="\n")
    for written in filter(None, (arguments.output, arguments.plot)):
        print(f"written          {written}")
