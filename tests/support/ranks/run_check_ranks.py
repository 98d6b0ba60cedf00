"""What `--check` says of command lines, and what models that are really built for them take.

`python run_check_ranks.py estimate|build|measure FOLDER` reads `FOLDER/cases.json`, command lines by name, and writes
`FOLDER/{what}{rank}.json`, an answer for each. `estimate` and `build` take any number of cases and are one process;
`measure` takes one case, and is a rank of its run.
"""

import json
import os
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import rebuild_tokenizer
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer
from torch.autograd.graph import saved_tensors_hooks

from maskmoe.check.activations import ActivationModel
from maskmoe.check.findings import find_problems
from maskmoe.check.layout import Layout
from maskmoe.check.memory import stage_memory
from maskmoe.check.parameters import count_parameters, mask_bytes
from maskmoe.check.report import experts_per_token
from maskmoe.training.arguments import add_maskmoe_arguments
from maskmoe.training.model_builder import MaskMoEGPTModelBuilder
from maskmoe.training.pretraining import add_pretraining_arguments
from maskmoe.training.setup import leaving_process_groups, model_config_from_args, parse_and_check_args


def estimate(ranks: int) -> dict[str, Any]:
    """What the check says of the command line of this process."""
    findings = find_problems(ranks, add_pretraining_arguments)
    if findings.errors:
        return {"errors": findings.errors}
    args, config = findings.args, findings.config
    layout = Layout.from_args(args)
    model = count_parameters(config, layout)
    mean_experts = experts_per_token(findings.mask, args.moe_router_topk)
    activations = ActivationModel.from_args(args, config.transformer, layout, mean_experts)
    memory = stage_memory(args, layout, model, activations, mask_bytes(config, findings.mask))
    whole = model.whole
    return {
        "parameters": whole.num_parameters,
        "expert_parameters": whole.expert_parameters,
        "parts": dict(whole.parameters),
        "layers": [whole.dense_layers, whole.moe_layers],
        "bytes_of_logits": layout.micro_batch * layout.seq_length * args.padded_vocab_size * args.params_dtype.itemsize,
        "memory": [asdict(stage) for stage in memory],
    }


def build(ranks: int) -> dict[str, Any]:
    """The model of the command line, built on this rank alone, and what a forward pass keeps for the backward pass."""
    args = parse_args(add_maskmoe_arguments)
    validate_args(args)
    rebuild_tokenizer(args)
    config = model_config_from_args(args)
    config.finalize()
    model_parallel_cuda_manual_seed(1)
    model = MaskMoEGPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    experts = [p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "expert_parameters": sum(experts),
        # Experts with biases cannot be run by the local modules.
        "kept": None if args.add_bias_linear else _kept_by_forward(args, model),
    }


def measure(ranks: int) -> dict[str, Any]:
    """Bytes of this rank's part of a run that has taken a step, and its parameters that are no replicas."""
    args = parse_and_check_args(add_pretraining_arguments, reads_data=lambda _: False)
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
    """Bytes of the storages that the backward pass of one micro-batch will read, those of parameters left out."""
    module = Float16Module(model.config, model) if args.bf16 else model
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(args.vocab_size, (args.micro_batch_size, args.seq_length), generator=generator)
    positions = torch.arange(args.seq_length).expand_as(tokens)
    mask = torch.ones(args.seq_length, args.seq_length, dtype=torch.bool).triu(1)[None, None]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module(tokens, positions, mask, labels=tokens)
    loss.sum().backward()
    return sum(kept.values())


def _optimizer_bytes(optimizer: Any, model_storages: set[int]) -> int:
    """Bytes of moments, and of main copies that are not the model's own parameters."""
    total = 0
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if parameter.untyped_storage().data_ptr() not in model_storages:
                total += parameter.nbytes
            total += sum(t.nbytes for name, t in inner.state[parameter].items() if name != "step")
    return total


def _is_first_replica(parameter: torch.nn.Parameter) -> bool:
    if getattr(parameter, "shared", False):
        # A copy of the embedding on the last stage.
        return False
    is_divided = getattr(parameter, "tensor_model_parallel", False)
    if getattr(parameter, "allreduce", True):
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    else:
        tensor_rank = parallel_state.get_expert_tensor_parallel_rank()
        data_rank = parallel_state.get_expert_data_parallel_rank()
    return data_rank == 0 and (is_divided or tensor_rank == 0)


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    answer = {"estimate": estimate, "build": build, "measure": measure}[what]
    if what == "build":
        torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    answers = {}
    with leaving_process_groups():
        for name, case in json.loads((folder / "cases.json").read_text()).items():
            sys.argv = [sys.argv[0], *case["flags"]]
            answers[name] = answer(case["ranks"])
    (folder / f"{what}{os.environ.get('RANK', '0')}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
