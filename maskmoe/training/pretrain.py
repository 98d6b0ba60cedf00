"""Entry point: `torchrun … -m maskmoe.training.pretrain <Megatron flags> --routing-mask FILE`, see `Trainer`."""

from maskmoe.training.loop.rank_process import prepare_rank, run_rank
from maskmoe.training.watch.console import hide_foreign_warnings


def main() -> None:
    """Prepare the process, then train."""
    prepare_rank()
    from maskmoe.training import trainer

    trainer.main()


if __name__ == "__mp_main__":  # a process that Megatron spawned, such as the writer of checkpoints
    from maskmoe.megatron_compat import prepare_process

    hide_foreign_warnings()
    prepare_process()
if __name__ == "__main__":
    run_rank(main, "pretrain")
