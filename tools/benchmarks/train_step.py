"""Measure a whole training step against stock Megatron-Core MoE of the same sizes.

The step includes forward, backward, gradient reduction and optimizer, on Zipf-distributed ids. Both sides have the
distributed optimizer, and overlap the reduction of gradients and the gathering of parameters.

The benchmark runs as one process, or with expert parallelism under torchrun. Under torchrun it also compares with a
floor: the floor of `dispatcher.py`, once for each layer.

    python tools/benchmarks/train_step.py
    torchrun --standalone --nproc-per-node 2 tools/benchmarks/train_step.py --assignment rank-local uniform
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
import argparse
from collections.abc import Iterator
from itertools import product
from typing import Any, Literal

import harness
import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import compare, run_and_report
from routed_tokens import add_engine_argument, as_stock, exchange_floor, fused_settings
from zipf import zipf_mask, zipf_probabilities

from maskmoe.routing_mask.assignment import MaskRecipe
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.layer_specs import backend_arguments, get_maskmoe_hybrid_stack_spec
from maskmoe.transformer.models import DenseHybridModel, MaskMoEHybridModel
from maskmoe.transformer.visible_experts import VisibleExperts


class Trainer:
    """Takes training steps of a model on given batches.

    Args:
        model: one pipeline stage that holds the whole model.
        config: the model's configuration.
        batches: dictionaries with `tokens` and `labels`, int64 [batch, sequence].
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: TransformerConfig,
        batches: Iterator[dict[str, torch.Tensor]],
    ) -> None:
        module = Float16Module(config, model) if config.bf16 else model
        overlap = {"use_distributed_optimizer": True, "overlap_param_gather": True}
        data_parallelism = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True, **overlap)
        self.model = DistributedDataParallel(config, data_parallelism, module)
        settings = OptimizerConfig(
            optimizer="adam", lr=1e-4, bf16=config.bf16, params_dtype=config.params_dtype, **overlap
        )
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        config.finalize_model_grads_func = finalize_model_grads
        self.batches = batches

    def step(self) -> None:
        """Take one training step."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=self.batches,
            model=[self.model],
            num_microbatches=1,
            # Only pipelines read the sizes.
            seq_length=0,
            micro_batch_size=0,
            forward_only=False,
        )
        self.optimizer.step()

    @staticmethod
    def _forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple:
        """Run the model on the next batch; return the losses and their mean as a function."""
        batch = next(batches)
        position_ids = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device).expand_as(batch["tokens"])
        losses = model(batch["tokens"], position_ids, None, labels=batch["labels"])
        return losses, lambda output: (output.mean(), {})


def zipf_batches(vocab_size: int, batch_size: int, seq_length: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of Zipf-distributed ids without end; the same seed yields the same batches."""
    rng = np.random.default_rng(seed)
    probabilities = zipf_probabilities(vocab_size)
    while True:
        ids = torch.from_numpy(rng.choice(vocab_size, size=(batch_size, seq_length + 1), p=probabilities)).cuda()
        yield {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def make_mask(arguments: argparse.Namespace, num_ranks: int) -> RoutingMask:
    """Build a mask for the distribution of the batches."""
    is_rank_local = arguments.assignment == "rank-local"
    recipe = MaskRecipe(
        num_experts=arguments.num_experts,
        num_layers=arguments.num_layers,
        assignment=arguments.assignment,
        frequent_mass=arguments.frequent_mass,
        frequent_visible_experts=arguments.frequent_visible_experts,
        expert_model_parallel_size=num_ranks if is_rank_local else None,
    )
    return zipf_mask(recipe, arguments.vocab_size)


def make_config(arguments: argparse.Namespace, topk: int, num_ranks: int, **layers: Any) -> TransformerConfig:
    """Return the configuration of a model with `layers`; 0 experts stand for a model without experts."""
    experts: dict[str, Any] = {
        "num_moe_experts": arguments.num_experts,
        "moe_router_topk": topk,
        "moe_router_pre_softmax": topk == 1,
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": 1e-2,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": num_ranks,
    }
    return TransformerConfig(
        hidden_size=arguments.hidden_size,
        bf16=arguments.dtype == "bfloat16",
        params_dtype=getattr(torch, arguments.dtype),
        num_attention_heads=arguments.num_attention_heads or arguments.hidden_size // 64,
        ffn_hidden_size=2 * arguments.hidden_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        normalization="RMSNorm",
        **layers,
        **(experts if arguments.num_experts else {}),
        **fused_settings(arguments.transformer_engine),
    )


def build_trainer(
    side: Literal["ours", "stock"], arguments: argparse.Namespace, topk: int, groups: ProcessGroupCollection
) -> Trainer:
    """Build a trainer of our hybrid model or of the stock GPT model; both have the same seed and batches."""
    torch.manual_seed(1)
    num_ranks = groups.ep.size()
    sizes: dict[str, Any] = {
        "vocab_size": arguments.vocab_size,
        "max_sequence_length": arguments.seq_length,
        "position_embedding_type": "rope",
        "pg_collection": groups,
    }
    if side == "stock":
        config = as_stock(make_config(arguments, topk, num_ranks, num_layers=arguments.num_layers))
        model = GPTModel(config, get_gpt_decoder_block_spec(config, **backend_arguments(config)), **sizes)
    else:
        layers = FeedForwardLayers((arguments.num_experts > 0,) * arguments.num_layers)
        sizes["hybrid_layer_pattern"] = pattern = layers.pattern("*")
        config = make_config(arguments, topk, num_ranks, num_layers=len(pattern), is_hybrid_model=True)
        if arguments.num_experts:
            mask = make_mask(arguments, num_ranks)
            visible_experts = VisibleExperts(config, mask, groups, hybrid_layer_pattern=pattern)
            spec = get_maskmoe_hybrid_stack_spec(config, visible_experts)
            model = MaskMoEHybridModel(config, spec, visible_experts=visible_experts, **sizes)
        else:
            model = DenseHybridModel(config, get_maskmoe_hybrid_stack_spec(config, None), **sizes)
    seed = torch.distributed.get_rank()
    batches = zipf_batches(arguments.vocab_size, arguments.batch_size, arguments.seq_length, seed)
    return Trainer(model.cuda(), config, batches)


def cases(arguments: argparse.Namespace, groups: ProcessGroupCollection) -> Iterator[harness.Case]:
    """Yield the cases for every assignment and k."""
    num_tokens = arguments.batch_size * arguments.seq_length
    hidden, gradient = torch.randn(2, num_tokens, arguments.hidden_size).cuda().to(getattr(torch, arguments.dtype))
    floor_of_layer = exchange_floor(hidden, gradient, groups.ep)

    def floor() -> None:
        for _ in range(arguments.num_layers):
            floor_of_layer()

    for assignment, topk in product(arguments.assignment, arguments.topk):
        sizes = argparse.Namespace(**vars(arguments) | {"assignment": assignment})
        ours, stock = (build_trainer(side, sizes, topk, groups) for side in ("ours", "stock"))
        name = f"train step {assignment} top-{topk} of {arguments.num_experts} ranks {groups.ep.size()}"
        name += " with Transformer Engine" if arguments.transformer_engine else ""
        yield compare(name, ours.step, "stock", stock.step)
        if groups.ep.size() > 1:
            yield compare(f"{name} to the floor", ours.step, "floor", floor)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = harness.make_parser(__doc__, repeats=15)
    parser.add_argument("--num-layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--num-attention-heads", type=int, help="(default: one for 64 channels)")
    parser.add_argument("--num-experts", type=int, default=16, help="0: a model without experts (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens in a sequence (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=4, help="sequences of each rank in a step (default: %(default)s)"
    )
    parser.add_argument("--topk", type=int, nargs="+", default=[1, 2], help="one case for each k (default: 1 2)")
    parser.add_argument(
        "--frequent-mass",
        type=float,
        default=0.4,
        help="share of all tokens whose ids see several experts (default: %(default)s)",
    )
    parser.add_argument(
        "--frequent-visible-experts", type=int, default=8, help="visible experts of these ids (default: %(default)s)"
    )
    parser.add_argument(
        "--assignment",
        nargs="+",
        choices=("uniform", "balanced", "rank-local"),
        default=["uniform"],
        help="one case for each assignment of visible experts (default: uniform)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of weights, whose main copies are float32 (default: %(default)s)",
    )
    add_engine_argument(parser)
    return parser


if __name__ == "__main__":
    run_and_report(cases, build_parser())
