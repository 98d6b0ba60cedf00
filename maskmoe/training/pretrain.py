"""Entry point: `torchrun … -m maskmoe.training.pretrain`, see `maskmoe.training.pretraining`.

With `--check` the entry point reports on the run instead of starting it, see `maskmoe.check`.
"""

from maskmoe.cli import run_tool
from maskmoe.megatron_compat import prepare_process


def main() -> None:
    """Prepare the process, then train, or check the command line if `--check` is given."""
    prepare_process()
    from maskmoe.check.command import check_run, requested_check
    from maskmoe.training import pretraining

    request = requested_check()
    if request.check is None:
        pretraining.main()
    else:
        check_run(request.check, request.check_json, pretraining.add_pretraining_arguments)


if __name__ == "__mp_main__":  # a process that Megatron spawned, such as the writer of checkpoints
    prepare_process()
if __name__ == "__main__":
    run_tool(main)
