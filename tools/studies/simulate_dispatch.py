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
to every rank that holds a selected expert; it is "planned" if the ids alone decide these ranks. If a variant is
impossible, the table gives the reason.

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
    --topk 8 --hidden-size 4096 --expert-model-parallel-size 64 --output dispatch.csv --plot dispatch.png
"""

import argparse
from pathlib import Path

from dispatch_report import draw_plot, terminal_table, write_costs
from dispatch_simulation import Simulation
from dispatch_traffic import Cluster, Link, Workload

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import add_force_argument, add_seed_argument, command_parser
from maskmoe.arguments.parser import add_option
from maskmoe.data.indexed_dataset import dataset_files, open_tokens
from maskmoe.errors import UserError
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import atomic_output
from maskmoe.processes.run_tool import run_tool
from maskmoe.routing_mask.frequency import TokenFrequency, check_same_vocabulary, count_token_frequency
from maskmoe.routing_mask.mask import RoutingMask, describe_visible_experts


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(__doc__)
    source = parser.add_argument_group("tokens and mask")
    add_option(source, "--data-path P", "prefix of a dataset (P.bin and P.idx exist)", required=True)
    add_option(source, "--routing-mask F", "routing mask of the dataset's tokenizer", Path, required=True)
    add_option(source, "--layer L", "layer of the mask, counted from 1 (default: the last layer)", ranges.LAYERS)
    tokens = "consecutive tokens of the dataset in the micro-batch of a rank"
    add_option(source, "--tokens-per-rank T", tokens, ranges.COUNT, default=4096)
    add_seed_argument(source, "the random choice of experts")

    model = parser.add_argument_group("model")
    topk = "experts of a token; give several to compare them"
    add_option(model, "--topk K", topk, ranges.EXPERTS, nargs="+", required=True)
    add_option(model, "--hidden-size H", "elements of a hidden state", ranges.COUNT, required=True)
    width = "elements inside of an expert; adds lines about the load at which planned dispatch loses its advantage"
    add_option(model, "--moe-ffn-hidden-size F", width, ranges.COUNT)
    size = "bytes of an element of a hidden state, 2 in bf16"
    add_option(model, "--bytes-per-element B", size, ranges.COUNT, default=2)

    cluster = parser.add_argument_group("cluster")
    speed = "operations of the experts per second, in 10^12"
    add_option(cluster, "--expert-tflops T", speed, ranges.Number(1e-9, 1e9, float), default=450)
    sizes, default = "numbers of GPUs to compare (default: 8, 16, … 4096)", tuple(8 << power for power in range(10))
    cluster.add_argument("--num-gpus", type=ranges.RANKS, nargs="+", default=default, metavar="G", help=sizes)
    add_option(cluster, "--gpus-per-node G", "GPUs of a node", ranges.PROCESSES, default=8)
    ranks = "number of expert-parallel ranks, limited to the number of GPUs (default: all GPUs)"
    add_option(cluster, "--expert-model-parallel-size E", ranks, ranges.RANKS)
    bandwidth = "bandwidth of a GPU to GPUs of its node, in each direction"
    add_option(cluster, "--intra-node-bandwidth GB/s", bandwidth, ranges.Number(1e-9, 1e9, float), default=450)
    latency = "constant time of a message to GPUs of its node"
    add_option(cluster, "--intra-node-latency µs", latency, ranges.Number(0, 1e9, float), default=1)
    bandwidth = "bandwidth of a GPU to other nodes, in each direction"
    add_option(cluster, "--inter-node-bandwidth GB/s", bandwidth, ranges.Number(1e-9, 1e9, float), default=50)
    latency = "constant time of a message to other nodes"
    add_option(cluster, "--inter-node-latency µs", latency, ranges.Number(0, 1e9, float), default=2)

    add_option(parser, "--output F", "file for the results in bytes and seconds, .csv", Path)
    add_option(parser, "--plot F", "file for a plot of the results, .png", Path)
    add_force_argument(parser)
    return parser.parse_args()


def count_frequency(data_path: str, mask: RoutingMask, mask_path: Path) -> TokenFrequency:
    """Count the ids of the dataset.

    Raises:
        UserError: The dataset is damaged, has ids that the mask does not have, or was made with another tokenizer.
    """
    try:
        frequency = count_token_frequency([data_path], mask.vocab_size, progress=True)
        check_same_vocabulary(frequency, mask)
        return frequency
    except UserError as error:
        raise UserError(
            f"routing mask {mask_path} with {mask.vocab_size:,} ids does not fit the dataset: {error}"
        ) from error


def clusters_of(arguments: argparse.Namespace) -> list[Cluster]:
    """Return the clusters that the flags describe, by ascending number of GPUs.

    Raises:
        UserError: The GPUs are not a whole number of nodes, or there are no two expert-parallel ranks.
    """
    node_link = Link(arguments.intra_node_bandwidth * 1e9, arguments.intra_node_latency * 1e-6)
    network_link = Link(arguments.inter_node_bandwidth * 1e9, arguments.inter_node_latency * 1e-6)
    clusters = []
    for num_gpus in sorted(set(arguments.num_gpus)):
        ep_size = min(num_gpus, arguments.expert_model_parallel_size or num_gpus)
        clusters.append(Cluster(num_gpus, ep_size, arguments.gpus_per_node, node_link, network_link))
    return clusters


def print_settings(arguments: argparse.Namespace, mask: RoutingMask, num_tokens: int) -> None:
    """Print the dataset, the mask, the micro-batches and the links."""
    print(f"dataset          {arguments.data_path}: {num_tokens:,} tokens")
    if max(arguments.num_gpus) * arguments.tokens_per_rank > num_tokens:
        print(f"                 with more than {num_tokens // arguments.tokens_per_rank:,} GPUs, ranks share tokens")
    print(f"mask             {mask.num_layers} layers: {describe_visible_experts(mask)}")
    print(
        f"micro-batch      {arguments.tokens_per_rank:,} tokens a rank, "
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
    clusters = clusters_of(arguments)
    outputs = [path for path in (arguments.output, arguments.plot) if path]
    check_outputs(outputs, [arguments.routing_mask, *dataset_files(arguments.data_path)], arguments.force)
    mask = RoutingMask.load(arguments.routing_mask)
    layer = mask.num_layers if arguments.layer is None else arguments.layer
    if layer > mask.num_layers:
        raise UserError(f"--layer is {layer}, but the routing mask has layers 1 to {mask.num_layers}")
    topks = sorted(set(arguments.topk))
    if topks[-1] > mask.num_experts:
        raise UserError(f"top-k must be 1 to {mask.num_experts}, the number of experts, not {topks[-1]}")
    sizes = (arguments.tokens_per_rank, arguments.hidden_size, arguments.bytes_per_element)
    workload = Workload(*sizes, mask.num_experts, mask.num_layers)
    tokens = open_tokens(arguments.data_path)
    frequency = count_frequency(arguments.data_path, mask, arguments.routing_mask)
    simulation = Simulation(mask, layer - 1, frequency, tokens, workload, arguments.seed)
    costs = simulation.run(clusters, topks, progress=True)
    if arguments.output:
        write_costs(costs, arguments.output)
    if arguments.plot:
        with atomic_output(arguments.plot) as temporary:
            draw_plot(costs, temporary)
    print_settings(arguments, mask, len(tokens))
    # An expert with a gated activation has three matrices; a backward pass has twice the operations of a forward pass.
    operations = 3 * 3 * 2 * arguments.hidden_size * (arguments.moe_ffn_hidden_size or 0)
    print(*terminal_table(costs, operations / (arguments.expert_tflops * 1e12)), sep="\n")
    for path in outputs:
        print(f"written          {path}")


if __name__ == "__main__":
    run_tool(main)
