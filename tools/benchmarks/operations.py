"""Count the operations that an MoE layer would launch on a GPU, and the waits of its host, without a GPU.

One process stands for rank 0 of 8 expert-parallel ranks. Collectives exchange nothing: an all-to-all hands a rank its
own rows back, and the number of operations does not depend on the rows. Views and allocations launch nothing and are
not counted. A Triton kernel counts as one operation; Triton's interpreter runs it. Experts only multiply rows by their
weights. The counts do not depend on the numbers of tokens and features.

    python tools/benchmarks/operations.py
"""

import os

from maskmoe.megatron_compat import prepare_process

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads the variable when it is imported.
prepare_process()
import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import routed_tokens
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer
from meter import cost_of
from moe_layer import LAYER_SETTINGS, build_layers
from routed_tokens import RoutedTokens, draw_tokens
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from maskmoe.transformer.dispatch import rows
from maskmoe.transformer.kernels import launching
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

NUM_RANKS, NUM_TOKENS, HIDDEN_SIZE = 8, 64, 64
_LAUNCHES_NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view"),
}


@dataclass(frozen=True)
class Operations:
    """The costs of one part of a layer.

    Attributes:
        forward: operations of the forward pass.
        backward: operations of the backward pass.
        forward_waits: waits of the host in the forward pass.
        backward_waits: waits of the host in the backward pass.
    """

    forward: int
    backward: int
    forward_waits: int
    backward_waits: int


class _Counter(TorchDispatchMode):
    """Counts operations that launch something, and Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the operation, and do it."""
        self.count += func.overloadpacket.__name__ not in _LAUNCHES_NOTHING
        return func(*args, **(kwargs or {}))

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Count the launch of a Triton kernel, and do it."""
        self.count += 0 not in grid
        _launch(kernel, grid, *arguments, **constants)


def _launch(*arguments: Any, launch: Callable[..., None] = launching.launch, **constants: Any) -> None:
    """Interpret a Triton kernel; the operations of the interpreter are invisible to counters."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        launch(*arguments, **constants)


@contextmanager
def ranks_on_gpus() -> Iterator[ProcessGroupCollection]:
    """Stand for rank 0 of `NUM_RANKS` ranks; the code of MaskMoE takes its branches for GPUs."""

    def exchange(received: Tensor, sent: Tensor, *sizes: Any, **options: Any) -> None:
        with torch._C._DisableTorchDispatch():
            number = min(received.numel(), sent.numel())
            received.flatten()[:number].copy_(sent.flatten()[:number])

    def gather(gathered: Tensor, own: Tensor, **options: Any) -> None:
        with torch._C._DisableTorchDispatch():
            gathered.view(-1, own.numel()).copy_(own.flatten())

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=NUM_RANKS, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    with (
        patch.object(torch.distributed, "all_to_all_single", exchange),
        patch.object(torch.distributed, "all_gather_into_tensor", gather),
        patch.object(rows, "is_on_cpu", lambda tensor: False),
        patch.object(launching, "runs_kernels", lambda tensor: True),
        patch.object(launching, "launch", _launch),
    ):
        yield ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def count(forward: Callable[[Tensor], Tensor], tokens: RoutedTokens) -> Operations:
    """Count a function of hidden states [tokens, 1, hidden] and its backward pass."""
    counts, waits = [], []
    hidden = tokens.hidden.detach().requires_grad_()
    outputs: list[Tensor] = []

    def backward() -> None:
        outputs[-1].backward(torch.ones_like(outputs[-1]))

    # Count waits in a pass of their own: the mode that sees them changes how some operations are dispatched.
    for work in (lambda: outputs.append(forward(hidden)), backward):
        waits.append(cost_of(work).host_waits)
    for work in (lambda: outputs.append(forward(hidden)), backward):
        with _Counter() as counter, patch.object(launching, "launch", counter.launch):
            work()
        counts.append(counter.count)
    return Operations(*counts, *waits)


def count_all() -> dict[str, Operations]:
    """Count the parts of layers with 64 experts and k = 8, by name."""
    found = {}
    with ranks_on_gpus() as groups:
        arguments = argparse.Namespace(
            hidden_size=HIDDEN_SIZE, experts=["8/64"], dtype="bfloat16", transformer_engine=False
        )
        settings = LAYER_SETTINGS | {"moe_ffn_hidden_size": 32}
        (config,) = routed_tokens.configs(arguments, NUM_RANKS, **settings)
        for name, mask_name in (("planned", "rank-local"), ("one copy", "any")):
            tokens = draw_tokens(config, NUM_TOKENS, mask_name, groups)
            ours, stock = build_layers(config, tokens, groups)
            token_ids = tokens.plan_ids()
            found |= {
                "stock": count(_layer(stock, None), tokens),
                name: count(_layer(ours, pack_token_ids(token_ids)), tokens),
                "router of stock": count(lambda hidden, router=stock.router: router(hidden)[0], tokens),
                "router": count(
                    lambda hidden, router=ours.router, ids=tokens.ids: router(hidden, TokenIds(ids).transpose())[0],
                    tokens,
                ),
            }
            if tokens.planner is not None:
                found["plan"] = _count_plan(tokens)
    return found


def _layer(layer: MoELayer, padding_mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the layer as a function of hidden states; its experts multiply rows by their weights."""
    layer.experts.forward = lambda rows, tokens_per_expert, weights: (rows * weights.unsqueeze(-1), None)
    return lambda hidden: layer(hidden, padding_mask=padding_mask)[0]


def _count_plan(tokens: RoutedTokens) -> Operations:
    """Count what planning the dispatch of one micro-batch costs."""
    waits = cost_of(tokens.plan_ids).host_waits
    with _Counter() as counter, patch.object(launching, "launch", counter.launch):
        tokens.plan_ids()
    return Operations(counter.count, 0, waits, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="F", help="also write the counts to this file")
    arguments = parser.parse_args()
    found = count_all()
    print(f"{'':<16} operations, forward / backward    waits of the host, forward / backward")
    for name, operations in sorted(found.items()):
        launches = f"{operations.forward} / {operations.backward}"
        print(f"{name:<16} {launches:<34} {operations.forward_waits} / {operations.backward_waits}")
    if arguments.json:
        arguments.json.write_text(json.dumps({name: asdict(each) for name, each in found.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
