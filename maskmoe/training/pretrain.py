"""Entry point: `torchrun … -m maskmoe.training.pretrain`, see `maskmoe.training.pretraining`.

With `--check` the entry point reports on the run instead of starting it, see `maskmoe.training.preflight`.
"""

from maskmoe.training.loop.rank_process import run_rank
from maskmoe.training.watch.console import console, hide_foreign_warnings


def main() -> None:
    """Prepare the process, then train, or check the command line if `--check` is given."""
    console.load("importing PyTorch and Megatron-Core")
    # Only now, since these imports take seconds and the first line should not wait for them.
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    console.route_logging()
    from maskmoe.training import pretraining
    from maskmoe.training.preflight.command import check_run, requested_check

    request = requested_check()
    if request.check is None:
        pretraining.main()
    else:
        check_run(request.check, request.check_json, pretraining.add_pretraining_arguments)


if __name__ == "__mp_main__":  # a process that Megatron spawned, such as the writer of checkpoints
    from maskmoe.megatron_compat import prepare_process

    hide_foreign_warnings()
    prepare_process()
if __name__ == "__main__":
    run_rank(main, "pretrain")
