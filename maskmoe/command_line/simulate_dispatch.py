r"""Compare ways to dispatch tokens to experts on 8 to thousands of GPUs, without a GPU.

The simulation takes real token ids and a routing mask. A random choice among the visible experts of each id replaces
the router. The hidden states that expert-parallel ranks would send each other are counted exactly: for the same choice
of experts, they are those that Megatron's and MaskMoE's dispatchers put into their all-to-alls. The times come from a
model of the network.

variants that are compared:
  top-k                routing over all experts, without a mask
  mask                 the given routing mask
  rank-local mask      a mask made from the frequencies of the data, with all experts of an id on one rank
  node-local mask      a mask made from the frequencies of the data, with all experts of an id on one node
"Row per expert" sends a hidden state for every selected expert, as Megatron does. "One copy" sends a hidden state once
to every rank that holds a selected expert. If a variant is impossible, the table gives the reason.

columns of the table:
  own, node, across    bytes that a rank sends to itself, to its node and to other nodes in one layer and one step,
                       forward and backward (mean over ranks)
  rows                 hidden states that a rank receives in one all-to-all (mean over ranks)
  load                 tokens × experts of the busiest rank over the mean: expected from the frequencies of the ids, and
                       of the drawn experts
  all-to-all           time of one all-to-all of hidden states; a layer has four of them in a step
  layer                time of everything that a layer sends in a step

Example:
  %(prog)s --data-path data/web_text_document --routing-mask mask.safetensors \
    --topk 8 --hidden-size 4096 --expert-model-parallel-size 64 --output dispatch.json --plot dispatch.png
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from maskmoe.analysis.dispatch_cost import Cluster, Layout, Link, Masks, MicroBatches, Simulation, Workload
from maskmoe.analysis.dispatch_cost.report import draw_plot, table, to_json
from maskmoe.command_line import ranges
from maskmoe.command_line.arguments import add_seed_argument, command_parser
from maskmoe.command_line.parser import add_force_argument
from maskmoe.data.indexed_dataset import dataset_files, open_tokens
from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output, check_outputs
from maskmoe.routing_mask import RoutingMask, TokenFrequency, count_token_frequency


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(__doc__)
    group = parser.add_argument_group("tokens and mask")
    source = group.add_argument
    source("--data-path", required=True, metavar="P", help="prefix of a dataset (P.bin and P.idx exist)")
    source("--routing-mask", type=Path, required=True, metavar="F", help="routing mask of the dataset's tokenizer")
    source(
        "--layer",
        type=ranges.LAYER,
        metavar="L",
        help="layer of the mask, counted from 1 (default: all layers, averaged)",
    )
    source(
        "--tokens-per-rank",
        type=ranges.TOKENS,
        default=4096,
        metavar="T",
        help="tokens in the micro-batch of a rank; each rank takes consecutive tokens from its own part of the dataset "
        "(default: %(default)s)",
    )
    add_seed_argument(group, "the random choice of experts")

    model = parser.add_argument_group("model").add_argument
    topk = "experts of a token; give several to compare them"
    model("--topk", type=ranges.EXPERTS, nargs="+", required=True, metavar="K", help=topk)
    size = "elements of a hidden state"
    model("--hidden-size", type=ranges.HIDDEN_SIZE, required=True, metavar="H", help=size)
    model(
        "--bytes-per-element",
        type=ranges.ELEMENT_BYTES,
        default=2,
        metavar="B",
        help="bytes of an element of a hidden state (default: %(default)s, bf16)",
    )

    cluster = parser.add_argument_group("cluster").add_argument
    cluster(
        "--num-gpus",
        type=ranges.RANKS,
        nargs="+",
        default=tuple(1 << exponent for exponent in range(3, 13)),
        metavar="G",
        help="numbers of GPUs to compare (default: 8, 16, … 4096)",
    )
    node = "GPUs of a node (default: %(default)s)"
    cluster("--gpus-per-node", type=ranges.RANKS_OF_NODE, default=8, metavar="G", help=node)
    cluster(
        "--expert-model-parallel-size",
        type=ranges.RANKS,
        metavar="E",
        help="number of expert-parallel ranks, limited to the number of GPUs (default: all GPUs)",
    )
    for flag, default, unit, meaning in (
        ("--intra-node-bandwidth", 450, "GB/s", "bandwidth of a GPU to GPUs of its node, in each direction"),
        ("--intra-node-latency", 1, "µs", "constant time of a message to GPUs of its node"),
        ("--inter-node-bandwidth", 50, "GB/s", "bandwidth of a GPU to other nodes, in each direction"),
        ("--inter-node-latency", 2, "µs", "constant time of a message to other nodes"),
    ):
        kind = ranges.BANDWIDTH if unit == "GB/s" else ranges.LATENCY
        cluster(flag, type=kind, default=default, metavar=unit, help=f"{meaning} (default: %(default)s)")

    parser.add_argument("--output", type=Path, metavar="F", help="file for the results in bytes and seconds, .json")
    parser.add_argument("--plot", type=Path, metavar="F", help="file for a plot of the results, .png")
    add_force_argument(parser)
    return parser.parse_args()


def count_frequency(data_path: str, mask: RoutingMask, mask_path: Path) -> TokenFrequency:
    """Count the ids of the dataset.

    Raises:
        UserError: The dataset is damaged, or has ids that the mask does not have.
    """
    try:
        return count_token_frequency([data_path], mask.vocab_size, progress=True)
    except UserError as error:
        raise UserError(
            f"routing mask {mask_path} with {mask.vocab_size:,} ids does not fit the dataset: {error}"
        ) from error


def print_settings(
    arguments: argparse.Namespace, mask: RoutingMask, batches: MicroBatches, layouts: Sequence[Layout]
) -> None:
    """Print the dataset, the mask, the micro-batches and the cluster."""
    is_frequent = mask.most_visible_of_id > 1
    sees = f"; {is_frequent.sum():,} of them see {mask.max_visible}" if is_frequent.any() else ""
    if hashed := mask.provenance.hash_layers:
        sees += f", and every id sees {hashed.visible_experts} in the first {hashed.num_layers} layers"
    print(f"dataset          {arguments.data_path}: {len(batches.tokens):,} tokens")
    if overlapping := [layout.num_gpus for layout in layouts if batches.overlap(layout.num_gpus)]:
        print(f"                 with {overlapping[0]:,} or more GPUs, some tokens are given to several ranks")
    print(f"mask             {mask.vocab_size:,} ids{sees} · {mask.num_experts:,} experts · layers: {mask.num_layers}")
    print(
        f"micro-batch      {batches.tokens_per_rank:,} tokens a rank, "
        f"hidden states of {arguments.hidden_size:,} × {arguments.bytes_per_element} bytes"
    )
    print(
        f"links of a GPU   within its node {arguments.intra_node_bandwidth:g} GB/s and "
        f"{arguments.intra_node_latency:g} µs a message, to other nodes {arguments.inter_node_bandwidth:g} GB/s and "
        f"{arguments.inter_node_latency:g} µs a message"
    )
    print(f"nodes            {arguments.gpus_per_node} GPUs each\n")


def main() -> None:
    """Simulate, write the results and print a table."""
    arguments = parse_arguments()
    all_num_gpus, ep_size = sorted(set(arguments.num_gpus)), arguments.expert_model_parallel_size
    ep_sizes = all_num_gpus if ep_size is None else [min(num_gpus, ep_size) for num_gpus in all_num_gpus]
    layouts = [Layout(*sizes, arguments.gpus_per_node) for sizes in zip(all_num_gpus, ep_sizes, strict=True)]
    cluster = Cluster(
        within=Link(arguments.intra_node_bandwidth * 1e9, arguments.intra_node_latency * 1e-6),
        across=Link(arguments.inter_node_bandwidth * 1e9, arguments.inter_node_latency * 1e-6),
    )
    outputs = [path for path in (arguments.output, arguments.plot) if path]
    check_outputs(outputs, [arguments.routing_mask, *dataset_files(arguments.data_path)], arguments.force)
    mask = RoutingMask.load(arguments.routing_mask)
    if arguments.layer is not None and not 1 <= arguments.layer <= mask.num_layers:
        raise UserError(f"--layer is {arguments.layer}, but the routing mask has layers 1 to {mask.num_layers}")
    layers = range(mask.num_layers) if arguments.layer is None else [arguments.layer - 1]
    workload = Workload(
        topks=tuple(sorted(set(arguments.topk))),
        tokens_per_rank=arguments.tokens_per_rank,
        hidden_size=arguments.hidden_size,
        bytes_per_element=arguments.bytes_per_element,
        num_experts=mask.num_experts,
        num_layers=mask.num_layers,
    )
    batches = MicroBatches(open_tokens(arguments.data_path), arguments.tokens_per_rank)
    with ExitStack() as stack:
        output = arguments.output and stack.enter_context(atomic_output(arguments.output))
        frequency = count_frequency(arguments.data_path, mask, arguments.routing_mask)
        simulation = Simulation(Masks(mask, layers, frequency), batches, cluster, workload, arguments.seed)
        results = simulation.run(layouts, progress=True)
        if output:
            # All settings that determine the results.
            settings = {
                name: value for name, value in vars(arguments).items() if name not in ("output", "plot", "force")
            }
            settings |= {"routing_mask": str(arguments.routing_mask), "routing_mask_digest": mask.digest}
            settings |= {"num_experts": mask.num_experts, "dataset_tokens": len(batches.tokens)}
            output.write_text(json.dumps(to_json(settings, results), indent=2) + "\n", encoding="utf-8")
        is_possible = any(result.cost for result in results)
        if arguments.plot and is_possible:
            draw_plot(results, stack.enter_context(atomic_output(arguments.plot)))
    print_settings(arguments, mask, batches, layouts)
    print(*table(results), sep="\n")
    for written in filter(None, (arguments.output, arguments.plot if is_possible else None)):
        print(f"written          {written}")
    if arguments.plot and not is_possible:
        print(f"no plot          {arguments.plot}: every variant is impossible, see the table")
