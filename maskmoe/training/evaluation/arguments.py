"""The flags that only evaluation has; this module imports neither PyTorch nor Megatron."""

from argparse import ArgumentParser

from maskmoe.arguments.commands import add_force_argument
from maskmoe.arguments.parser import add_option
from maskmoe.training.settings.arguments import replace_help

SPLITS = ("train", "valid", "test")


def add_evaluation_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the `evaluation` group, and defaults for the settings of training that Megatron requires."""
    group = parser.add_argument_group(title="evaluation")
    split = "which split of --data-path to evaluate, every sample once: weights of datasets have no effect"
    group.add_argument("--eval-split", choices=SPLITS, default="valid", help=split)
    counts = (
        "token counts made by maskmoe count, which define the frequency bands; if the flag is left out, the tokens of "
        "--data-path are counted"
    )
    add_option(group, "--token-frequency FILE", counts)
    add_option(group, "--output FILE", "also write the results as JSON; the loss of a band without tokens is null")
    add_force_argument(group)
    parser.set_defaults(eval_iters=0)
    replace_help(parser, {"--eval-iters": "number of batches to evaluate (default: 0, all samples of the split)"})
    parser.set_defaults(micro_batch_size=4, skip_train=True, no_load_optim=True, no_load_rng=True, num_workers=0)
    return parser
