"""Entry point: `torchrun … -m maskmoe.training.evaluate`, see `maskmoe.training.inference.evaluation`."""

from maskmoe.training.loop.rank_process import prepare_rank, run_rank


def main() -> None:
    """Prepare the process, then evaluate."""
    prepare_rank()
    from maskmoe.training.inference import evaluation

    evaluation.main()


if __name__ == "__main__":
    run_rank(main, "evaluate")
