"""Compare the speed of checkpoint conversions, both ways, with `cp` of the same bytes, and check their peak memory.

The weights of the model repeat one random block. Times include the time until the files are on the disk. Every
conversion runs in a process of its own, whose peak memory must stay within 2 GiB and the largest tensor: the imports, a
file of the result, and the weights of one layer. Conversions that also compare the source with its digests are measured
apart.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import torch

from maskmoe.megatron_compat import prepare_process

prepare_process()

from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface
from maskmoe.conversion.export_huggingface import write_huggingface
from maskmoe.conversion.model_files import output_folder
from maskmoe.conversion.model_tensors import OpenedModel, tensor_shapes, with_routing_mask
from maskmoe.conversion.settings import Settings
from maskmoe.conversion.tensor_sources import BLOCK_BYTES, Block, TensorSpec
from maskmoe.conversion.tokenizer import WITHOUT_TEXT
from maskmoe.processes.run_tool import run_tool

CONVERSIONS = {"megatron-to-hf": megatron_to_huggingface, "hf-to-megatron": huggingface_to_megatron}
LARGEST_TENSOR = 16 * 2 * 4096 * 2048 * 2  # bytes of the experts' gate and up projections of a layer
MEMORY_BOUND = (2 << 30) + LARGEST_TENSOR
# A layer has 16 experts of 3 · 2048 · 4096 weights in bf16, which are 768 MiB, and attention.
CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4096,
    "tie_word_embeddings": False,
}
BYTES_OF_LAYER = 792 << 20


class RepeatedBlock:
    """Provides tensors that repeat one random block."""

    def __init__(self, tensors: dict[str, TensorSpec]) -> None:
        self.tensors = tensors
        self._elements = torch.randn(BLOCK_BYTES // 2).to(torch.bfloat16)

    def read(self, block: Block) -> torch.Tensor:
        """See `TensorSource.read`."""
        repeats = -(-block.num_elements // self._elements.numel())
        return self._elements.repeat(repeats)[: block.num_elements].view(block.sizes)


def make_model(folder: Path, gib: float) -> None:
    """Write a model of about `gib` GiB in transformers' format."""
    from maskmoe.huggingface import MaskMoEConfig

    num_layers = max(1, round(gib * 2**30 / BYTES_OF_LAYER))
    config = MaskMoEConfig(**CONFIG, num_hidden_layers=num_layers).to_dict() | {"routing_mask": None}
    shapes = tensor_shapes(config)
    source = RepeatedBlock({name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()})
    model = with_routing_mask(OpenedModel(source, config))
    with output_folder(folder) as unfinished:
        write_huggingface(model, unfinished, Settings.max_shard_size, WITHOUT_TEXT, None)


def convert(conversion: str, load: Path, save: Path, verify: bool) -> tuple[float, int]:
    """Run one conversion in a process of its own; return its seconds and its peak memory in bytes."""
    shutil.rmtree(save, ignore_errors=True)
    command = [sys.executable, __file__, "--measure", conversion, str(load), str(save), "verify" * verify]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured = json.loads(output.splitlines()[-1])
    return measured["seconds"], measured["peak"]


def measure(conversion: str, load: str, save: str, verify: str) -> None:
    start = time.perf_counter()
    CONVERSIONS[conversion](Settings(Path(load), Path(save), verify=bool(verify), tokenizer_type=WITHOUT_TEXT))
    seconds = time.perf_counter() - start
    # The kernel's `ru_maxrss` would include the memory of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(json.dumps({"seconds": seconds, "peak": int(peak[1]) * 1024}))


def copy(load: Path, save: Path) -> float:
    """Copy a folder, wait until the copy is on the disk, and return the seconds."""
    shutil.rmtree(save, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", load, save], check=True)
    subprocess.run(["sync", *(path for path in save.rglob("*") if path.is_file())], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = harness.make_parser(__doc__, repeats=3)
    parser.add_argument("--gib", type=float, default=1.5, metavar="N", help="size of the model (default: %(default)s)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder for files of 2N GiB (default: a new one)")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        load, save = folder / "model", folder / "result"
        make_model(load, arguments.gib)
        results, peaks = [], {}
        for conversion in ("hf-to-megatron", "megatron-to-hf"):
            size = sum(path.stat().st_size for path in load.rglob("*") if path.is_file()) / 2**30
            ours: dict[bool, list[float]] = {False: [], True: []}
            baseline = []
            for _ in range(arguments.repeats):
                baseline.append(size / copy(load, save))
                for verify, rates in ours.items():
                    seconds, peak = convert(conversion, load, save, verify)
                    rates.append(size / seconds)
                    peaks[conversion] = max(peaks.get(conversion, 0), peak)
            results.append(harness.Result(conversion, "GiB/s", ours[False], baseline))
            results.append(harness.Result(f"{conversion} with the source's digests", "GiB/s", ours[True], baseline))
            shutil.rmtree(load)
            save.rename(load)
    for conversion, peak in peaks.items():
        print(f"{conversion} peak memory {peak / 2**20:.0f} MiB (bound: {MEMORY_BOUND / 2**20:.0f} MiB)")
    harness.report(results, arguments.json)
    if max(peaks.values()) > MEMORY_BOUND:
        sys.exit("the memory bound is broken")


if __name__ == "__main__":
    run_tool(main)
