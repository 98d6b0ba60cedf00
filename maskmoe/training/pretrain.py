"""Entry point: `torchrun … -m maskmoe.training.pretrain <Megatron flags> --routing-mask FILE`, see `Trainer`.

With `--check` the entry point reports on the run instead of starting it, see `maskmoe.training.preflight`.
"""

from maskmoe.training.loop.rank_process import prepare_rank, run_rank
from maskmoe.training.watch.console import hide_foreign_warnings


def main() -> None:
    """Prepare the process, then train, or check the command line if `--check` is given."""
    prepare_rank()
    from maskmoe.training import trainer
    from maskmoe.training.preflight.command import check_run, requested_check
    from maskmoe.training.settings.pretraining_arguments import add_pretraining_arguments

    request = requested_check()
    if request.check is None:
        trainer.main()
    else:
        check_run(request.check, request.check_json, add_pretraining_arguments)


if __name__ == "__mp_main__":  # a process that Megatron spawned, such as the writer of checkpoints
    from maskmoe.megatron_compat import prepare_process

    hide_foreign_warnings()
    prepare_process()
if __name__ == "__main__":
    run_rank(main, "pretrain")
