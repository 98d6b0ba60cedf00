"""Entry point: `torchrun … -m maskmoe.training.pretrain <Megatron flags> --routing-mask FILE`, see `Trainer`."""

from collections.abc import Callable
from typing import Any

from maskmoe.training.rank_process import prepare_helper, prepare_rank, run_rank


def main(builder: Callable[[], Any] | None = None) -> None:
    """Prepare the process, then train; `builder` is that of `run_program`."""
    prepare_rank()
    from maskmoe.training import trainer

    trainer.main(builder() if builder else None)


if __name__ == "__mp_main__":
    prepare_helper()
if __name__ == "__main__":
    run_rank(main, "pretrain")
