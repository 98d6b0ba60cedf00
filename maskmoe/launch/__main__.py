"""`launch/pretrain.sh` calls this; see its `--help`."""

import os
import signal
import subprocess
import sys

from maskmoe.cli import EXIT_BAD_INPUT, run_tool
from maskmoe.errors import UserError
from maskmoe.interruption import EXIT_REQUEUE, SIGNALS_THAT_SAVE
from maskmoe.launch.command import check_command, run_flags, torchrun_command
from maskmoe.launch.devices import Devices, find_devices
from maskmoe.launch.model_file import Flags, ModelFile, override, split_flags
from maskmoe.launch.network import route_to, wait_for
from maskmoe.launch.options import Options, parse_options
from maskmoe.launch.supervisor import Supervisor


def main() -> None:
    for number in SIGNALS_THAT_SAVE:
        # Nothing to save yet. Once ranks are there, the supervisor takes over.
        signal.signal(number, lambda *_: sys.exit(EXIT_REQUEUE))
    options = parse_options(sys.argv[1:], os.environ)
    model = ModelFile.read(options.model, {**os.environ, "RUN_DIR": str(options.run_dir)})
    devices = None
    if options.processes_per_node is None or not (options.dry_run or options.check_only):
        devices = find_devices()
    processes = options.processes_per_node or devices.num_gpus or 1
    ranks = processes * options.nodes
    flags = run_flags(options, model.flags_for(ranks), split_flags(options.flags))
    if options.check_only:
        sys.exit(check(flags, ranks, None))
    route = route_to(*options.rendezvous) if options.rendezvous else None
    command = torchrun_command(options, flags, processes, route, os.environ)
    if options.dry_run:
        print(command)
        return
    if not options.node_rank:
        if options.checks and check(flags, ranks, devices):
            sys.exit(EXIT_BAD_INPUT)
    else:
        wait_for(*options.rendezvous, options.rendezvous_timeout)
    make_run_dir(options)
    print(f"launch: {command}", flush=True)
    sys.exit(Supervisor(options.shutdown_timeout).run(command))


def check(flags: Flags, ranks: int, devices: Devices | None) -> int:
    """Check the flags for so many ranks; prints what is found and returns the exit code.

    Args:
        devices: of this machine, if it will run the ranks; None to take them to be GPUs unless the flags say otherwise.
    """
    if devices is not None and not devices.num_gpus:
        flags = override({"distributed-backend": ("gloo",)}, flags)
    command = check_command(flags, ranks, os.environ)
    return subprocess.run(command.words, env={**os.environ, **command.environment}, check=False).returncode


def make_run_dir(options: Options) -> None:
    """Make this node's log folder in the run's.

    Raises:
        UserError: it cannot be made.
    """
    folder = options.run_dir / "logs" / options.node_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; choose another --run-dir") from error


if __name__ == "__main__":
    run_tool(main)
