"""Entry point: `torchrun … -m maskmoe.training.generate`, see `maskmoe.training.inference.generation`."""

from maskmoe.training.loop.rank_process import prepare_rank, run_rank


def main() -> None:
    """Prepare the process, then generate."""
    prepare_rank()
    from maskmoe.training.inference import generation

    generation.main()


if __name__ == "__main__":
    run_rank(main, "generate")
