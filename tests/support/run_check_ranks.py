"""Reports of `--check` on command lines, and measurements of the models that these command lines build.

The command `measure` runs as the ranks of a training run and takes one case. The other commands run as one process and
take any number of cases.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import rebuild_tokenizer
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer
from support.tensors import KeptBytes

from maskmoe.megatron_compat import cpu
from maskmoe.training.model.model_builder import model_config_from_args
from maskmoe.training.preflight.inspection import inspect_run
from maskmoe.training.process_groups import temporary_process_groups
from maskmoe.training.run_checks import parse_and_check_args
from maskmoe.training.settings.arguments import add_maskmoe_arguments, add_pretraining_arguments


def report(ranks: int) -> dict[str, Any]:
    """Return the report of `--check` on the command line of this process."""
    return inspect_run(ranks).to_json()


def report_on_a_gpu(ranks: int) -> dict[str, Any]:
    """Return the report of `--check` on a machine with GPUs and the packages of this machine."""
    cpu.is_installed = lambda: False
    return report(ranks)


class MambaStub(torch.nn.Module):
    """A layer with ten parameters that forks the random state as Mamba's mixer does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        with get_cuda_rng_tracker().fork():
            self.weight = torch.nn.Parameter(torch.rand(10))


def report_with_mamba(ranks: int) -> dict[str, Any]:
    """Return the report of `--check` where layers of Mamba can be built."""
    hybrid_stack_spec.submodules.mamba_layer = ModuleSpec(MambaStub)
    return report(ranks)


def build(ranks: int) -> dict[str, Any]:
    """Build the model on this rank alone, count its parameters, and measure what its forward pass keeps.

    Args:
        ranks: unused; a built model is always on one rank.
    """
    args = parse_args(add_maskmoe_arguments)
    validate_args(args)
    rebuild_tokenizer(args)
    config = model_config_from_args(args)
    config.megatron.finalize()
    model_parallel_cuda_manual_seed(1)
    # The previous model may have had other numbers of layers and of predicted tokens.
    get_moe_metrics_tracker().metrics.clear()
    MTPLossLoggingHelper.tracker.clear()
    model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    experts = [p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "expert_parameters": sum(experts),
        # The local modules cannot run experts with biases.
        "kept": None if args.add_bias_linear else _kept_by_forward(args, model),
    }


def measure(ranks: int) -> dict[str, Any]:
    """Take a step of training, and measure the bytes of this rank and its parameters that no other rank counts.

    Args:
        ranks: unused; the environment has the number of ranks.
    """
    args = parse_and_check_args(add_pretraining_arguments).args
    initialize_megatron()
    model, optimizer, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, model_config_from_args(args)),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.step()
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    buffers = [item for chunk in model for item in chunk.named_buffers()]
    return {
        "weights": sum(p.nbytes for p in parameters) + sum(b.nbytes for n, b in buffers if ".routing_mask." not in n),
        "gradients": sum(parameter.main_grad.nbytes for parameter in parameters),
        "optimizer": _optimizer_bytes(optimizer, {p.untyped_storage().data_ptr() for p in parameters}),
        "routing_mask": sum(buffer.nbytes for name, buffer in buffers if ".routing_mask." in name),
        "parameters": sum(parameter.numel() for parameter in parameters if _is_first_replica(parameter)),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
    }


def _kept_by_forward(args: Namespace, model: torch.nn.Module) -> int:
    """Return the bytes that the forward pass of a micro-batch keeps for the backward pass, without parameters."""
    module = Float16Module(model.config, model) if args.bf16 else model
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(args.vocab_size, (args.micro_batch_size, args.seq_length), generator=generator)
    positions = torch.arange(args.seq_length).expand_as(tokens)
    mask = None
    if args.create_attention_mask_in_dataloader:
        mask = torch.ones(len(tokens), 1, args.seq_length, args.seq_length, dtype=torch.bool).triu(1)
    with KeptBytes([*module.parameters(), *module.buffers()]) as kept:
        loss = module(tokens, positions, mask, labels=tokens)
    kept_bytes = kept.total()
    loss.sum().backward()
    return kept_bytes


def _optimizer_bytes(optimizer: Any, model_storages: set[int]) -> int:
    """Return the bytes of moments, and of main copies that are not parameters of the model."""
    total = 0
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if parameter.untyped_storage().data_ptr() not in model_storages:
                total += parameter.nbytes
            total += sum(t.nbytes for name, t in inner.state[parameter].items() if name != "step")
    return total


def _is_first_replica(parameter: torch.nn.Parameter) -> bool:
    """Return whether this rank is the first of those that hold a copy of a parameter."""
    if getattr(parameter, "shared", False):
        # The last stage has a copy of the embedding.
        return False
    is_divided = getattr(parameter, "tensor_model_parallel", False)
    if getattr(parameter, "allreduce", True):
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    else:
        tensor_rank = parallel_state.get_expert_tensor_parallel_rank()
        data_rank = parallel_state.get_expert_data_parallel_rank()
    return data_rank == 0 and (is_divided or tensor_rank == 0)


def answer_cases(command: str, cases: dict[str, dict[str, Any]], working_folder: Path) -> dict[str, dict[str, Any]]:
    """Return a command's answer for each case: the number of ranks and the flags that it is called for."""
    os.chdir(working_folder)
    answers_of = {
        function.__name__: function for function in (report, report_on_a_gpu, report_with_mamba, build, measure)
    }
    if command == "build":
        torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    answers = {}
    with temporary_process_groups():
        for name, case in cases.items():
            sys.argv = [sys.argv[0], *case["flags"]]
            answers[name] = answers_of[command](case["ranks"])
    return answers
