"""Makes the page of `--help` from MaskMoE's own flags, at once: it imports neither PyTorch nor Megatron-Core."""

import argparse
import textwrap
from functools import partial

from maskmoe.training.inference.flags import add_evaluation_arguments, add_generation_arguments
from maskmoe.training.settings.flags import add_check_arguments, add_maskmoe_flags, add_pretraining_arguments

_WIDTH = 100
_PRETRAIN = "Pretrain a language model. The flags are Megatron's, with those of MaskMoE."
_EVALUATE = "Compute the loss of a checkpoint on a dataset, by token frequency."
_GENERATE = "Continue a text with a checkpoint. The text goes to stdout, everything else to stderr."
_PROGRAMS = {
    "pretrain": (_PRETRAIN, add_pretraining_arguments, add_check_arguments),
    "evaluate": (_EVALUATE, add_evaluation_arguments),
    "generate": (_GENERATE, add_generation_arguments),
}
_LAYOUT = (
    "--tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size --expert-model-parallel-size "
    "--expert-tensor-parallel-size --sequence-parallel"
)
_DATA = "--data-path --split --tokenizer-type --tokenizer-model --vocab-size --num-workers --mock-data"
_OF_A_LOADED_MODEL = {
    "data": _DATA,
    "checkpoint": "--load --ckpt-step --use-checkpoint-args",
    "layout": _LAYOUT,
    "batches": "--micro-batch-size --seq-length --seed --bf16",
}
MEGATRON_FLAGS = {
    "pretrain": {
        "model": "--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --group-query-attention "
        "--num-query-groups --seq-length --max-position-embeddings --position-embedding-type --normalization --swiglu "
        "--untie-embeddings-and-output-weights --hybrid-layer-pattern",
        "experts": "--num-experts --moe-ffn-hidden-size --moe-router-topk --moe-layer-freq --moe-aux-loss-coeff "
        "--moe-shared-expert-intermediate-size --moe-token-dispatcher-type --moe-grouped-gemm",
        "training": "--micro-batch-size --global-batch-size --train-iters --lr --min-lr --lr-decay-style "
        "--lr-warmup-iters --weight-decay --clip-grad --bf16 --seed --recompute-granularity "
        "--use-distributed-optimizer",
        "layout": _LAYOUT,
        "data": _DATA,
        "checkpoints": "--save --load --save-interval --async-save --ckpt-step --use-checkpoint-args --finetune",
        "logging": "--log-interval --eval-interval --eval-iters --tensorboard-dir --wandb-project --exit-interval",
    },
    "evaluate": _OF_A_LOADED_MODEL | {"evaluation": "--eval-iters"},
    "generate": _OF_A_LOADED_MODEL,
}
"""The most used flags of Megatron, by program and by subject."""


def help_page(name: str) -> str:
    """Return what `--help` of an entry point prints.

    Args:
        name: Name of the entry point, such as `pretrain`. A check has the page of pretraining.
    """
    name = "pretrain" if name == "check" else name
    description, *providers = _PROGRAMS[name]
    parser = argparse.ArgumentParser(
        usage=f"maskmoe {name} [--nproc-per-node N] [flags]\n"
        f"       torchrun --nproc-per-node N -m maskmoe.training.{name} [flags]",
        description=description,
        add_help=False,
        formatter_class=partial(argparse.HelpFormatter, width=_WIDTH),
    )
    for add_arguments in (add_maskmoe_flags, *providers):
        add_arguments(parser)
    subjects = (
        textwrap.fill(f"{subject}: {flags}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
        for subject, flags in MEGATRON_FLAGS[name].items()
    )
    often = "\n".join(("Often used flags of Megatron:", *subjects))
    return f"{parser.format_help()}\n{often}\n\n--help-all shows all flags, hundreds of them, and takes some seconds.\n"
