r"""Count the occurrences of each token id in the training data.

A routing mask is built from these counts. Counts of several datasets, for instance of the shards of one text, can be
joined.

Example:
  %(prog)s --data-path 0.7 data/web_text_document 0.3 data/books_text_document \
    --vocab-size 32000 --output counts.safetensors
  %(prog)s --merge counts-0.safetensors counts-1.safetensors --output counts.safetensors
"""

from pathlib import Path

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import add_force_argument, add_workers_argument, command_parser
from maskmoe.arguments.parser import add_option
from maskmoe.data.data_path import files_of_data_path
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import atomic_output
from maskmoe.routing_mask.frequency import (
    TokenFrequency,
    count_token_frequency,
    ids_by_frequency,
    merge_token_frequencies,
)


def print_summary(frequency: TokenFrequency) -> None:
    """Print the datasets, the most frequent ids and the digest of the counts."""
    occurrences = frequency.occurrences
    for dataset, weight in zip(frequency.datasets, frequency.weights, strict=True):
        blend = "" if weight is None else f" · blend weight {weight:g}"
        print(f"dataset          {dataset['name']}: {dataset['num_tokens']:,} tokens{blend}")
    never_seen = int((occurrences == 0).sum())
    print(f"tokens           {frequency.num_tokens:,}")
    print(f"ids never seen   {never_seen:,} of {frequency.vocab_size:,} ({never_seen / frequency.vocab_size:.1%})")
    most_frequent = ids_by_frequency(occurrences)[:5]
    shares = ", ".join(f"{token} ({occurrences[token] / occurrences.sum():.2%})" for token in most_frequent)
    print(f"most frequent    {shares}")
    print(f"digest           {frequency.digest}")


def main() -> None:
    """Count, write the counts and print a summary."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "--data-path",
        nargs="+",
        metavar="P",
        help="the value of Megatron's --data-path in training, so that the counts follow the same blend: dataset "
        "prefixes (PREFIX.bin and PREFIX.idx exist), or alternating blend weights and prefixes",
    )
    add_option(parser, "--vocab-size V", "number of ids of the tokenizer, without padding", ranges.VOCAB_SIZE)
    add_option(parser, "--merge COUNTS", "add up counts that this command has written, instead of counting", nargs="+")
    add_option(parser, "--output F", "file to write, .safetensors", Path, required=True)
    add_force_argument(parser)
    add_workers_argument(parser)
    arguments = parser.parse_args()
    if arguments.merge is None and (arguments.data_path is None or arguments.vocab_size is None):
        parser.error("give --data-path and --vocab-size, or --merge")
    others = (arguments.data_path, arguments.vocab_size, arguments.workers)
    if arguments.merge is not None and any(value is not None for value in others):
        parser.error("--data-path, --vocab-size and --workers do not apply to --merge")
    inputs = files_of_data_path(arguments.data_path) if arguments.data_path is not None else []
    check_outputs([arguments.output], [*inputs, *(arguments.merge or ())], arguments.force)
    with atomic_output(arguments.output) as temporary:
        if arguments.merge is None:
            frequency = count_token_frequency(*others, progress=True)
        else:
            frequency = merge_token_frequencies(arguments.merge)
        frequency.save(temporary)
    print_summary(frequency)
    print(f"written          {arguments.output}")
