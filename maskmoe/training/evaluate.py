"""Entry point: `torchrun … -m maskmoe.training.evaluate`, see `maskmoe.training.evaluation.evaluation`."""

from collections.abc import Callable
from typing import Any

from maskmoe.training.rank_process import prepare_rank, run_rank


def main(builder: Callable[[], Any] | None = None) -> None:
    """Prepare the process, then evaluate; `builder` is that of `run_program`."""
    prepare_rank()
    from maskmoe.training.evaluation import evaluation

    evaluation.main(builder() if builder else None)


if __name__ == "__main__":
    run_rank(main, "evaluate")
