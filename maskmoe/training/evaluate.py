"""Entry point: `torchrun … -m maskmoe.training.evaluate`, see `maskmoe.training.inference.evaluation`."""

from maskmoe.training.loop.rank_process import run_rank
from maskmoe.training.watch.console import console


def main() -> None:
    """Prepare the process, then run `maskmoe.training.inference.evaluation`."""
    console.load("importing PyTorch and Megatron-Core")
    # Only now, since these imports take seconds and the first line should not wait for them.
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    console.route_logging()
    from maskmoe.training.inference import evaluation

    evaluation.main()


if __name__ == "__main__":
    run_rank(main, "evaluate")
