"""Measure the counting of token ids on one core against numpy.bincount of the whole file, with data in the page cache.

The ids are Zipf-distributed. The benchmark also measures the time to build masks of 131,072 ids and 256 experts.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import harness
import numpy as np
from zipf import zipf_probabilities

from maskmoe.data.dataset_writing import IndexedDatasetWriter
from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.processes.run_tool import run_tool
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency, count_token_frequency


def write_dataset(prefix: Path, vocab_size: int, dtype: type, num_bytes: int) -> None:
    """Write a dataset of about `num_bytes` bytes that repeats one block of Zipf-distributed ids."""
    rng = np.random.default_rng(0)
    block = rng.permutation(vocab_size)[rng.choice(vocab_size, size=1 << 22, p=zipf_probabilities(vocab_size))]
    block = block.astype(dtype)
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for _ in range(max(1, num_bytes // block.nbytes)):
            writer.add_documents(block, np.array([len(block)]))


def counting_case(folder: Path, vocab_size: int, dtype: type, num_bytes: int) -> harness.Case:
    prefix = folder / f"zipf{vocab_size}"
    write_dataset(prefix, vocab_size, dtype, num_bytes)
    gigabytes = open_tokens(prefix).nbytes / 1e9

    def ours() -> None:
        count_token_frequency([str(prefix)], vocab_size, workers=1)

    def baseline() -> None:
        np.bincount(open_tokens(prefix), minlength=vocab_size)

    name = f"count {np.dtype(dtype).name} vocabulary {vocab_size}"
    return harness.Case(name, "GB/s", harness.rate(ours, gigabytes), harness.rate(baseline, gigabytes))


def mask_builds(num_layers: int) -> Iterator[harness.Result]:
    """Yield the time to build a large mask of each assignment, once and without a baseline."""
    vocab_size, num_experts = 131072, 256
    counts = np.random.default_rng(0).multinomial(2 * 10**9, zipf_probabilities(vocab_size))[None]
    dataset = {"name": "zipf", "num_tokens": int(counts.sum()), "idx_sha256": "", "bin_bytes": 0}
    frequency = TokenFrequency(counts, (None,), (dataset,), None)
    for assignment, ranks in (("uniform", None), ("balanced", None), ("rank-local", 8)):
        recipe = MaskRecipe(num_experts, num_layers, assignment, 0.4, 8, expert_model_parallel_size=ranks)
        measure = harness.seconds(partial(build_routing_mask, recipe, frequency=frequency))
        yield harness.Result(f"mask build, {assignment}", "s", [measure()], [])


def main() -> None:
    parser = harness.make_parser(__doc__)
    parser.add_argument(
        "--megabytes", type=int, default=256, metavar="M", help="size of each dataset in MB (default: %(default)s)"
    )
    parser.add_argument("--mask-layers", type=int, default=64, help="layers of the masks (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = arguments.megabytes * 10**6
        cases = [
            counting_case(Path(folder), 32000, np.uint16, num_bytes),
            counting_case(Path(folder), 131072, np.int32, num_bytes),
        ]
        results = chain(mask_builds(arguments.mask_layers), harness.run(cases, arguments.repeats))
        harness.report(results, arguments.json)


if __name__ == "__main__":
    run_tool(main)
