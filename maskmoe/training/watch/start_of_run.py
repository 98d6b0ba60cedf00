"""Writes the start of a run: its header, and its arguments."""

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.transformer.module import MegatronModule

import maskmoe
from maskmoe.errors import UserError, counted, listed
from maskmoe.files.outputs import write_text
from maskmoe.files.run_folder import ARGUMENTS
from maskmoe.processes.console import console
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask, describe_visible_experts
from maskmoe.training.resume.find_checkpoint import checkpoint_to_load
from maskmoe.training.settings.inputs import data_prefixes
from maskmoe.training.settings.samples import BatchSizes, requested_training_samples, training_iterations
from maskmoe.training.watch.callback import Callback

_FIRST_WORDS = "# The flags of a run"  # of each args.yaml that a run has written
_LABEL_WIDTH = 12
_MOST_NAMED_DATASETS = 2


def count_parameters(chunks: Sequence[MegatronModule]) -> int:
    """Count the parameters of the model that all ranks hold together; a collective call."""
    ranks = mpu.get_data_parallel_rank(with_context_parallel=True), mpu.get_tensor_model_parallel_rank()
    ranks_of_experts = mpu.get_expert_data_parallel_rank(), mpu.get_expert_tensor_parallel_rank() or 0
    total = torch.zeros((), dtype=torch.int64, device=torch.cuda.current_device())
    for name, parameter in (item for chunk in chunks for item in chunk.named_parameters()):
        is_divided = getattr(parameter, "tensor_model_parallel", False)
        data_rank, tensor_rank = ranks
        if ".mlp.experts." in name:
            is_divided = parameter.dim() > 1 or "linear_fc1" in name
            data_rank, tensor_rank = ranks_of_experts
        # The last pipeline stage may have a copy of the embedding.
        is_copy = data_rank > 0 or (tensor_rank > 0 and not is_divided) or getattr(parameter, "shared", False)
        total += 0 if is_copy else parameter.numel()
    torch.distributed.all_reduce(total)
    return int(total)


class StartOfRun(Callback):
    """Opens logs, and writes arguments and the header on the first rank, when nothing refuses the run any more."""

    def __init__(self, args: Namespace, mask: RoutingMask | None, folder: Path | None) -> None:
        self._args = args
        self._mask = mask
        self._folder = folder

    def on_model_built(self, chunks: Sequence[MegatronModule]) -> None:
        """Write the files, and print the header; a collective call."""
        console.open_log(self._folder)
        if self._folder is not None and self._args.rank == 0:
            _write_arguments(self._args, self._folder)
        dispatch = getattr(chunks[0], "dispatch_kind", None)
        parameters = count_parameters(chunks)
        fields = describe_run(self._args, self._mask, self._folder, parameters, dispatch and dispatch.value)
        console.say("\n".join(f"{label:<{_LABEL_WIDTH}}{text}" for label, text in fields.items()))
        checkpoint = checkpoint_to_load(self._args)
        console.load(f"reading {checkpoint}" if checkpoint else "setting up the optimizer")


def describe_run(
    args: Namespace, mask: RoutingMask | None, folder: Path | None, parameters: int, dispatch: str | None
) -> dict[str, str]:
    """Return the lines of the header by their labels.

    `parameters` counts the whole model; `dispatch` says in words how tokens reach their experts, None without experts.
    """
    fields = {
        "model": _describe_model(args),
        "parameters": f"{parameters:,}",
        "layout": f"{counted(args.world_size, 'rank')}: TP {args.tensor_model_parallel_size} · "
        f"PP {args.pipeline_model_parallel_size} · CP {args.context_parallel_size} · DP {args.data_parallel_size} · "
        f"EP {args.expert_model_parallel_size} · ETP {args.expert_tensor_parallel_size}",
        "step": _describe_step(args),
        "dispatch": dispatch,
        "mask": f"{describe_visible_experts(mask)}; digest {mask.digest[:16]}…" if mask else None,
        "data": _describe_data(args),
        "start": _describe_start(args),
        "folder": _describe_folder(args, folder),
    }
    return {label: text for label, text in fields.items() if text}


def _describe_start(args: Namespace) -> str:
    checkpoint = checkpoint_to_load(args)
    if checkpoint is None:
        return "from random weights"
    return f"{'from the weights of' if args.finetune else 'resumes from'} {checkpoint}"


def _describe_step(args: Namespace) -> str:
    sizes = BatchSizes.from_args(args).sizes
    samples, tokens = (
        " to ".join(dict.fromkeys(f"{size * factor:,}" for size in (sizes[0], sizes[-1])))
        for factor in (1, args.seq_length)
    )
    return (
        f"{samples} samples × {args.seq_length:,} = {tokens} tokens, in micro-batches of {args.micro_batch_size}; "
        f"{training_iterations(args):,} iterations"
    )


def _describe_model(args: Namespace) -> str:
    layers = FeedForwardLayers.of_args(args)
    kind = "GPT" if args.hybrid_layer_pattern is None else f"hybrid {args.hybrid_layer_pattern}"
    experts = f"; {args.num_experts} experts in {sum(layers.decoder)}, top-{args.moe_router_topk}"
    return (
        f"{kind}, {args.num_layers} layers{experts if args.num_experts else ''}; hidden size {args.hidden_size:,}, "
        f"{args.num_attention_heads} heads, vocabulary {args.padded_vocab_size:,}"
    )


def _describe_data(args: Namespace) -> str:
    tokens = f"{requested_training_samples(args) * args.seq_length:,} tokens in all"
    if args.mock_data:
        return f"mock data; {tokens}"
    split = f", split {args.split}" if args.split else ""
    return f"{listed(data_prefixes(args), _MOST_NAMED_DATASETS)}{split}; {tokens}"


def _describe_folder(args: Namespace, folder: Path | None) -> str:
    if folder is None:
        return "none: without --save, nothing is saved and arguments and logs are not written"
    logs = ", logs/rank*.log" if console.log else ""
    checkpoints = f"checkpoints in {args.save}" if args.save else "no checkpoints without --save"
    return f"{folder}: {ARGUMENTS}{logs}; {checkpoints}"


def _write_arguments(args: Namespace, folder: Path) -> None:
    """Write the command and all arguments into the run folder, but not over a file that no run has written."""
    # Megatron computes the number of iterations from --train-samples later, so add the number here.
    values = vars(args) | {"train_iters": training_iterations(args)}
    packages = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch"))
    lines = (
        f"{_FIRST_WORDS}: {shlex.join(sys.argv)}",
        f"# Started in {os.getcwd()} with maskmoe {maskmoe.__version__}, {packages}",
        "# All arguments, with the values that Megatron derives:",
        *(f"{name}: {' '.join(str(value).split())}" for name, value in sorted(values.items())),
    )
    path = folder / ARGUMENTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().startswith(_FIRST_WORDS.encode()):
            raise UserError(f"no run has written the file that exists in {folder}")
        write_text(path, "\n".join(lines) + "\n")
    except (OSError, UserError) as error:
        console.say(f"note: {ARGUMENTS} is not written: {error}")
