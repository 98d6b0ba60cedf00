"""Measure the experts of one layer, forward and backward, against Megatron-Core's `SequentialMLP`.

Megatron's data parallelism adds each weight's gradient to an fp32 buffer and frees it.

    python tools/benchmarks/experts.py
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
import argparse
from collections.abc import Callable, Iterator

import harness
import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import compare, run_and_report
from routed_tokens import fused_settings, with_main_grads
from torch import Tensor
from zipf import zipf_probabilities

from maskmoe.transformer.experts import GroupedMLP


def make_experts(
    kind: type[SequentialMLP], config: TransformerConfig, groups: ProcessGroupCollection
) -> DistributedDataParallel:
    """Build experts that accumulate gradients in `main_grad`."""
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return with_main_grads(kind(config.num_moe_experts, config, submodules, groups).cuda())


def draw_load(name: str, num_rows: int, num_experts: int) -> Tensor:
    """Return the rows of each expert: equal numbers (`even`), or drawn from a Zipf distribution (`zipf`)."""
    if name == "even":
        return torch.full((num_experts,), num_rows // num_experts)
    return torch.from_numpy(np.random.default_rng(0).multinomial(num_rows, zipf_probabilities(num_experts)))


def step(experts: DistributedDataParallel, tokens_per_expert: Tensor) -> Callable[[], None]:
    """Return one forward and backward pass."""
    config = experts.config
    num_rows = int(tokens_per_expert.sum())
    hidden, gradient = torch.randn(2, num_rows, config.hidden_size, dtype=config.params_dtype, device="cuda")
    probs = torch.rand(num_rows, device="cuda")

    def work() -> None:
        with experts.no_sync():
            output, _ = experts(hidden.detach().requires_grad_(), tokens_per_expert, probs.detach().requires_grad_())
            output.backward(gradient)

    return work


def cases(arguments: argparse.Namespace, groups: ProcessGroupCollection) -> Iterator[harness.Case]:
    """Yield the cases for every size and load."""
    dtype = getattr(torch, arguments.dtype)
    for size in arguments.sizes:
        num_rows, hidden_size, width, num_experts = map(int, size.replace("/", "x").split("x"))
        config = TransformerConfig(
            num_layers=1,
            hidden_size=hidden_size,
            moe_ffn_hidden_size=width,
            num_attention_heads=4,
            num_moe_experts=num_experts,
            moe_router_dtype="fp32",
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            params_dtype=dtype,
            **fused_settings(transformer_engine=False),
        )
        ours, stock = (make_experts(kind, config, groups) for kind in (GroupedMLP, SequentialMLP))
        for load in ("even", "zipf"):
            tokens_per_expert = draw_load(load, num_rows, num_experts)
            name = f"experts {size} {load} {arguments.dtype}"
            yield compare(name, step(ours, tokens_per_expert), "stock", step(stock, tokens_per_expert))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = harness.make_parser(__doc__)
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=harness.sizes("RxHxF/N"),
        default=["4096x512x1024/8", "4096x512x1024/16", "4096x512x1024/64", "2048x256x512/16"],
        metavar="RxHxF/N",
        help="cases: R rows of H features, N gated experts of width F",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of weights and rows (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    run_and_report(cases, build_parser())
