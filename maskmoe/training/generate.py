"""Entry point: `torchrun … -m maskmoe.training.generate`, see `maskmoe.training.inference.generation`."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from maskmoe.errors import UserError
from maskmoe.training.loop.rank_process import run_rank
from maskmoe.training.watch.console import console


def main() -> None:
    """Prepare the process, then run `maskmoe.training.inference.generation`."""
    check_prompt_is_given(sys.argv[1:])
    console.load("importing PyTorch and Megatron-Core")
    # Only now, since these imports take seconds and the first line should not wait for them.
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    console.route_logging()
    from maskmoe.training.inference import generation

    generation.main()


def check_prompt_is_given(words: Sequence[str]) -> None:
    """Refuse an empty prompt before anything is imported.

    Args:
        words: the command line without the program.

    Raises:
        UserError: `--prompt` is empty.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--prompt", nargs="?")
    given, _ = parser.parse_known_args(words)
    if given.prompt is not None and not given.prompt.strip():
        raise UserError("--prompt is empty")


if __name__ == "__main__":
    run_rank(main, "generate")
