r"""Count the occurrences of each token id in the training data.

A routing mask is built from these counts.

Example:
  %(prog)s --data-path 0.7 data/web_text_document 0.3 data/books_text_document \
    --vocab-size 32000 --output counts.safetensors
"""

from pathlib import Path

from maskmoe import ranges
from maskmoe.cli import atomic_output
from maskmoe.commands.arguments import add_workers_argument, command_parser
from maskmoe.routing_mask.assignment import ids_by_frequency
from maskmoe.routing_mask.frequency import TokenFrequency, count_token_frequency


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
        required=True,
        metavar="P",
        help="the value of Megatron's --data-path in training, so that the counts follow the same blend: dataset "
        "prefixes (PREFIX.bin and PREFIX.idx exist), or alternating blend weights and prefixes",
    )
    size = "number of ids of the tokenizer, without padding"
    parser.add_argument("--vocab-size", type=ranges.VOCAB_SIZE, required=True, metavar="V", help=size)
    parser.add_argument("--output", type=Path, required=True, metavar="F", help="file to write, .safetensors")
    add_workers_argument(parser)
    arguments = parser.parse_args()
    with atomic_output(arguments.output) as temporary:
        frequency = count_token_frequency(arguments.data_path, arguments.vocab_size, arguments.workers, progress=True)
        frequency.save(temporary)
    print_summary(frequency)
    print(f"written          {arguments.output}")
