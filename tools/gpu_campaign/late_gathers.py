"""Trains with `--overlap-param-gather` while parameters arrive as late as they may: `late_gathers.py pretrain FLAGS…`.

Each gather of parameters runs when it is waited for. So whatever reads a parameter without waiting reads the weights of
the step before, on every device and whatever the timing. With the environment variable WITHOUT_WAITS, the waits of
`maskmoe.transformer.gathered_parameters` are left out: the negative control.
"""

import os
import sys
from dataclasses import dataclass
from typing import Any

from maskmoe.training.rank_process import prepare_rank, run_rank


def main() -> None:
    """Patch data parallelism, then train."""
    prepare_rank()
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    from maskmoe.megatron_compat import replace
    from maskmoe.training import trainer
    from maskmoe.transformer import gathered_parameters

    start = _ParamAndGradBucketGroup.start_param_sync

    @dataclass
    class LateGather:
        """Takes the place of the handle of a gather that has begun."""

        group: Any

        def wait(self) -> None:
            """Gather the parameters now."""
            self.group.param_gather_handle = None
            start(self.group)
            self.group.param_gather_handle.wait()

    def start_late(group: Any, force_sync: bool = False) -> None:
        if force_sync:
            start(group, force_sync)
        else:
            group.param_gather_handle, group.param_gather_dispatched = LateGather(group), True

    replace(_ParamAndGradBucketGroup, "start_param_sync", start_late)
    if "WITHOUT_WAITS" in os.environ:
        replace(gathered_parameters, "waits_for_parameters", lambda hook: False)
    trainer.main()


if __name__ == "__mp_main__":  # a process that Megatron spawned
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
if __name__ == "__main__":
    run_rank(main, sys.argv.pop(1))
