"""Makes the page of `--help` from MaskMoE's own flags, at once: it imports neither PyTorch nor Megatron-Core."""

import argparse
from functools import partial

from maskmoe.training.evaluation.arguments import add_evaluation_arguments
from maskmoe.training.preflight.arguments import add_check_arguments
from maskmoe.training.settings.arguments import add_maskmoe_flags, add_pretraining_arguments

_PROGRAMS = {
    "pretrain": (
        "Pretrain a language model. The flags are Megatron's and MaskMoE's.",
        add_pretraining_arguments,
        add_check_arguments,
    ),
    "evaluate": ("Compute the loss of a checkpoint on a dataset, by token frequency.", add_evaluation_arguments),
}


def help_page(name: str) -> str:
    """Return what `maskmoe pretrain --help` and `maskmoe evaluate --help` print about the flags of a run.

    Args:
        name: `pretrain` or `evaluate`.
    """
    description, *providers = _PROGRAMS[name]
    parser = argparse.ArgumentParser(
        usage=f"torchrun --nproc-per-node N -m maskmoe.training.{name} [flags]",
        description=description,
        epilog="The most used flags of Megatron are in the model files launch/models/*.yaml. --help-all shows all "
        "flags, hundreds of them, and takes some seconds.",
        add_help=False,
        formatter_class=partial(argparse.HelpFormatter, width=100),
    )
    for add_arguments in (add_maskmoe_flags, *providers):
        add_arguments(parser)
    return parser.format_help()
