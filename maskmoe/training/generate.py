"""Entry point: `torchrun … -m maskmoe.training.generate`, see `maskmoe.training.generation`."""

from maskmoe.training.console import console
from maskmoe.training.rank_process import run_rank


def main() -> None:
    """Prepare the process, then run `maskmoe.training.generation`."""
    console.load("importing PyTorch and Megatron-Core")
    # Only now, since these imports take seconds and the first line should not wait for them.
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    console.route_logging()
    from maskmoe.training import generation

    generation.main()


if __name__ == "__main__":
    run_rank(main, "generate")
