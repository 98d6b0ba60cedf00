"""Entry point: `torchrun … -m maskmoe.training.evaluate`, see `maskmoe.training.evaluation`."""

from maskmoe.cli import run_tool
from maskmoe.megatron_compat import prepare_process


def main() -> None:
    """Prepare the process, then run `maskmoe.training.evaluation`."""
    prepare_process()
    from maskmoe.training import evaluation

    evaluation.main()


if __name__ == "__main__":
    run_tool(main)
