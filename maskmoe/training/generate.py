"""Entry point: `torchrun … -m maskmoe.training.generate`, see `maskmoe.training.generation`."""

from maskmoe.cli import run_tool
from maskmoe.megatron_compat import prepare_process


def main() -> None:
    """Prepare the process, then run `maskmoe.training.generation`."""
    prepare_process()
    from maskmoe.training import generation

    generation.main()


if __name__ == "__main__":
    run_tool(main)
