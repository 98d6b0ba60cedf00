"""The flags that only evaluation or generation has; this module imports neither PyTorch nor Megatron."""

from argparse import ArgumentParser, _ArgumentGroup, _MutuallyExclusiveGroup
from pathlib import Path

from maskmoe.command_line import ranges
from maskmoe.command_line.parser import add_force_argument, add_option
from maskmoe.training.settings.flags import replace_help

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


def add_generation_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the `generation` group, and defaults for the settings of training that Megatron requires."""
    # Megatron has an old --batch-size, which it refuses.
    group = parser.add_argument_group(title="generation", conflict_handler="resolve")
    add_prompt_arguments(group)
    temperature = "divides the logits before a token is drawn; 0 always takes the most probable token"
    for flag, kind, default, meaning in (
        ("--max-new-tokens", ranges.NEW_TOKENS, 64, "stop after this many tokens, or at the end of the text"),
        ("--temperature", ranges.TEMPERATURE, 0.8, temperature),
        ("--top-k", ranges.TOP_K, 50, "draw among this many of the most probable tokens; 0: all"),
    ):
        group.add_argument(flag, type=kind, default=default, help=meaning)
    group.add_argument("--output", metavar="FILE", help="also write the text to this file")
    add_force_argument(group)
    parser.set_defaults(batch_size=None, micro_batch_size=1, skip_train=True, no_load_optim=True, no_load_rng=True)
    return parser


def add_prompt_arguments(parser: ArgumentParser | _ArgumentGroup) -> _MutuallyExclusiveGroup:
    """Add `--prompt` and `--prompts-file`, exactly one of which is needed, and `--batch-size`.

    Returns:
        The group of the first two, to which further sources of prompts can be added.
    """
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    source.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="file of texts to continue: one text a line, or JSON lines with the key `prompt` if the name ends in "
        "`.jsonl`. The output is JSON lines with the key `text`",
    )
    parser.add_argument(
        "--batch-size",
        dest="prompts_per_batch",
        type=ranges.BATCH_SIZE,
        default=8,
        metavar="N",
        help="continue this many texts of --prompts-file at a time",
    )
    return source
