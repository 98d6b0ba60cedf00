"""Write maskmoe/training/help/*.txt: what `--help` of pretraining, evaluation and generation prints.

python docs/generators/help.py [--check]

The parser of these programs is Megatron's, with hundreds of flags, and importing it takes seconds. So `--help` prints a
page with our flags and the most used flags of Megatron.
"""

import argparse
import os
import sys

import flags
import pages

from maskmoe.megatron_compat import prepare_process
from maskmoe.megatron_compat.patches import escape_percent_signs_in_help

_FOLDER = pages.DOCS.parent / "maskmoe" / "training" / "help"
_WIDTH = 100

DESCRIPTIONS = {
    "pretrain": "Pretrain a language model. The flags are Megatron's, with those of MaskMoE.",
    "evaluate": "Compute the loss of a checkpoint on a dataset, by token frequency, or score texts.",
    "generate": "Continue a text with a checkpoint. The text goes to stdout, everything else to stderr.",
}
EPILOG = "--help-all shows all flags, hundreds of them, and takes some seconds."

_MODEL = (
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "group-query-attention"),
    *("num-query-groups", "seq-length", "max-position-embeddings", "position-embedding-type", "normalization"),
    *("swiglu", "untie-embeddings-and-output-weights", "hybrid-layer-pattern"),
)
_EXPERTS = (
    *("num-experts", "moe-ffn-hidden-size", "moe-router-topk", "moe-layer-freq", "moe-aux-loss-coeff"),
    *("moe-shared-expert-intermediate-size", "moe-token-dispatcher-type", "moe-grouped-gemm"),
)
_TRAINING = (
    *("micro-batch-size", "global-batch-size", "train-iters", "lr", "min-lr", "lr-decay-style", "lr-warmup-iters"),
    *("weight-decay", "clip-grad", "bf16", "seed", "recompute-granularity", "use-distributed-optimizer"),
)
_LAYOUT = (
    *("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size"),
    *("expert-model-parallel-size", "expert-tensor-parallel-size", "sequence-parallel"),
)
_DATA = ("data-path", "split", "tokenizer-type", "tokenizer-model", "vocab-size", "num-workers", "mock-data")
_CHECKPOINTS = ("save", "load", "save-interval", "async-save", "ckpt-step", "use-checkpoint-args", "finetune")
_LOGGING = ("log-interval", "eval-interval", "eval-iters", "tensorboard-dir", "wandb-project", "exit-interval")

_OF_A_LOADED_MODEL = {
    "data": _DATA,
    "checkpoint": ("load", "ckpt-step", "use-checkpoint-args"),
    "layout": _LAYOUT,
    "batches": ("micro-batch-size", "seq-length", "seed", "bf16"),
}
MEGATRON_FLAGS = {
    "pretrain": {
        "model": _MODEL,
        "experts": _EXPERTS,
        "training": _TRAINING,
        "layout": _LAYOUT,
        "data": _DATA,
        "checkpoints": _CHECKPOINTS,
        "logging": _LOGGING,
    },
    "evaluate": _OF_A_LOADED_MODEL | {"evaluation": ("eval-iters",)},
    "generate": _OF_A_LOADED_MODEL,
}
"""The most used flags of Megatron, by program and by the title of their group."""


def render(name: str) -> str:
    """Return the help page of a program.

    Args:
        name: the program, such as `pretrain`.
    """
    from megatron.training.arguments import add_megatron_arguments

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for provider in flags.megatron_providers()[name]:
        provider(own)
    full = add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    for provider in flags.megatron_providers()[name]:
        provider(full)
    escape_percent_signs_in_help(full)
    page = argparse.ArgumentParser(
        prog=f"maskmoe {name}",
        usage=f"maskmoe {name} [--nproc-per-node N] [flags]\n"
        f"       torchrun --nproc-per-node N -m maskmoe.training.{name} [flags]",
        description=DESCRIPTIONS[name],
        epilog=EPILOG,
        add_help=False,
    )
    for group in own._action_groups:
        add_group(page, group.title if group._group_actions and group.title else "", group._group_actions)
    for title, names in MEGATRON_FLAGS[name].items():
        add_group(page, f"Megatron's flags: {title}", [full._option_string_actions[f"--{flag}"] for flag in names])
    return page.format_help()


def add_group(page: argparse.ArgumentParser, title: str, actions: list[argparse.Action]) -> None:
    """Add a group of arguments to a page, unless it is empty."""
    if actions:
        group = page.add_argument_group("options" if title == "options" else title)
        for action in actions:
            group._add_action(action)


def main() -> None:
    """Write the pages, or check them if `--check` is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; if a page is stale, exit with code 1")
    is_check = parser.parse_args().check
    os.environ["COLUMNS"] = str(_WIDTH + 2)  # argparse leaves two columns free
    for name in DESCRIPTIONS:
        path, text = _FOLDER / f"{name}.txt", render(name)
        if not is_check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.relative_to(pages.DOCS.parent)} is stale; run: python docs/generators/help.py")


if __name__ == "__main__":
    prepare_process()
    main()
