"""Writes the start of a run: its header, and its arguments."""

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.transformer.module import MegatronModule

from maskmoe.arguments.flags import flags_to_yaml, split_flags
from maskmoe.errors import UserError, counted, listed
from maskmoe.files.outputs import write_text
from maskmoe.files.run_folder import ARGUMENTS
from maskmoe.processes.console import console
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask, describe_visible_experts
from maskmoe.training.resume.choose_checkpoint import checkpoint_to_load
from maskmoe.training.settings.inputs import data_prefixes
from maskmoe.training.settings.samples import BatchSizes, requested_training_samples, training_iterations
from maskmoe.training.watch.callback import Callback
from maskmoe.training.watch.writers import log_facts, own_program

_FIRST_WORDS = "# The flags of a run, as a model file"  # of each args.yaml that a run has written
_LABEL_WIDTH = 12
_MOST_NAMED_DATASETS = 2
_FOLDERS = frozenset(("save", "load", "tensorboard-dir", "wandb-save-dir", "data-cache-path"))
"""The flags of the folders that a run writes; `--load` is usually the folder of `--save`."""


def count_parameters(chunks: Sequence[MegatronModule]) -> int:
    """Count the parameters of the model that all ranks hold together; a collective call."""
    data = mpu.get_data_parallel_world_size(with_context_parallel=True)
    expert_data = torch.distributed.get_world_size(mpu.get_expert_data_parallel_group())
    tensor = mpu.get_tensor_model_parallel_world_size()
    expert_tensor = mpu.get_expert_tensor_parallel_world_size() or 1
    # A rank counts its share of each parameter that several ranks hold, so that the shares add up to whole numbers.
    total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    for name, parameter in (item for chunk in chunks for item in chunk.named_parameters()):
        if getattr(parameter, "shared", False):
            continue  # a copy of the embedding on the last pipeline stage
        if ".mlp.experts." in name:
            is_divided = parameter.dim() > 1 or "linear_fc1" in name
            holders = expert_data * (1 if is_divided else expert_tensor)
        else:
            holders = data * (1 if getattr(parameter, "tensor_model_parallel", False) else tensor)
        total += parameter.numel() / holders
    torch.distributed.all_reduce(total)
    return round(float(total))


class StartOfRun(Callback):
    """Opens logs, and writes arguments and prints the header on the first rank.

    All this is done once the model is built, because a refused run leaves no files.
    """

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
        fields = describe_run(
            self._args, self._mask, self._folder, count_parameters(chunks), dispatch and dispatch.value
        )
        console.say("\n".join(f"{label:<{_LABEL_WIDTH}}{text}" for label, text in fields.items()))
        log_facts(fields)
        checkpoint = checkpoint_to_load(self._args)
        console.load(f"reading {checkpoint}" if checkpoint else "setting up the optimizer")

    def before_micro_batch(self) -> None:
        """Note that loading is over."""
        console.end_of_loading()


def describe_run(
    args: Namespace, mask: RoutingMask | None, folder: Path | None, parameters: int, dispatch: str | None
) -> dict[str, str]:
    """Return the lines of the header by their labels, at most 15.

    `parameters` counts the whole model; `dispatch` says in words how tokens reach their experts, None without experts.
    """
    fields = {
        "model": _describe_model(args),
        "parameters": f"{_short(parameters)} ({parameters:,})",
        "layout": _describe_layout(args),
        "step": _describe_step(args),
        "dispatch": dispatch,
        "mask": f"{describe_visible_experts(mask)}; digest {mask.digest[:16]}…" if mask else None,
        "data": _describe_data(args),
        "start": describe_start(args),
        "folder": _describe_folder(args, folder),
    }
    return {label: text for label, text in fields.items() if text}


def _describe_layout(args: Namespace) -> str:
    """Return the numbers of ranks of a run in words: `2 ranks: TP 1 · PP 1 · CP 1 · DP 2 · EP 2 · ETP 1`."""
    return (
        f"{counted(args.world_size, 'rank')}: TP {args.tensor_model_parallel_size} · "
        f"PP {args.pipeline_model_parallel_size} · CP {args.context_parallel_size} · DP {args.data_parallel_size} · "
        f"EP {args.expert_model_parallel_size} · ETP {args.expert_tensor_parallel_size}"
    )


def describe_start(args: Namespace) -> str:
    """Return where the weights of a run come from, in words."""
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
    logs = f"{Path('logs')}{os.sep}rank*.log" if console.log else "no log files with --verbose"
    checkpoints = f"checkpoints in {args.save}" if args.save else "no checkpoints without --save"
    return f"{folder}: args.yaml, {logs}; {checkpoints}"


def _short(number: int) -> str:
    """Return a number with three digits and a unit: 2.17 M, 1.71 B."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} k"


def _write_arguments(args: Namespace, folder: Path) -> None:
    """Write the arguments into the run folder."""
    # Megatron computes the number of iterations from --train-samples later, so add the number here.
    complete = Namespace(**vars(args) | {"train_iters": training_iterations(args)})
    words = sys.argv[1:]
    if program := own_program():  # the launcher has taken `--program` out of the flags
        words = ["--program", program, *words]
    path = folder / ARGUMENTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().startswith(_FIRST_WORDS.encode()):
            raise UserError(f"no run has written the file that exists in {folder}")
        write_text(path, arguments_text(complete, words, folder))
    except (OSError, UserError) as error:
        console.say(f"note: {ARGUMENTS} is not written: {error}")


def arguments_text(args: Namespace, words: Sequence[str], folder: Path) -> str:
    """Return the text of `args.yaml`: the flags in the words of the command line, then all arguments as comments.

    Paths in the run folder are written with `${RUN_DIR}`, so that another run with this file has its own folders.
    Relative paths of folders that the run writes are made absolute first.
    """
    flags = dict(split_flags(words))
    flags |= {name: tuple(os.path.abspath(value) for value in flags[name]) for name in _FOLDERS & flags.keys()}
    flags = {name: tuple(map(_escape, values)) for name, values in flags.items()}
    # A program in the run folder is not copied, so another run uses the same file.
    for name in flags.keys() - {"program"}:
        flags[name] = tuple(_in_run_folder(value, folder) for value in flags[name])
    command = f"launch/pretrain.sh --run-dir DIR {ARGUMENTS}"
    values: Mapping[str, object] = vars(args)
    return "\n".join(
        (
            f"{_FIRST_WORDS}: `{command}` starts another run with the same flags.",
            f"# Relative paths are relative to {os.getcwd()}",
            flags_to_yaml(flags).rstrip("\n"),
            "",
            "# All arguments, with Megatron's defaults and the values that Megatron derives:",
            *(f"# {name}: {' '.join(str(values[name]).split())}" for name in sorted(values)),
            "",
        )
    )


def _escape(value: str) -> str:
    return value.replace("$", "$$")


def _in_run_folder(value: str, folder: Path) -> str:
    """Return a value in which the path of the run folder, if the value begins with it, is a variable."""
    for path in (folder.absolute(), os.path.abspath(folder)):  # with and without `..`
        start = _escape(str(path))
        if value == start or value.startswith(start + os.sep):
            return "${RUN_DIR}" + value.removeprefix(start)
    return value
