"""Launches a training run: checks the settings, makes the run folder, and runs torchrun."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from maskmoe.cli import EXIT_BAD_INPUT
from maskmoe.errors import UserError
from maskmoe.folder_lock import check_unlocked
from maskmoe.interruption import EXIT_REQUEUE, SIGNALS_THAT_SAVE
from maskmoe.launch.command import RUN_ENVIRONMENT, run_flags, torchrun_command, unset_variables
from maskmoe.launch.devices import Devices, find_devices
from maskmoe.launch.model_file import Flags, ModelFile, flag_words, override, split_flags
from maskmoe.launch.network import route_to, wait_for
from maskmoe.launch.options import parse_options
from maskmoe.launch.supervisor import Supervisor


def launch(program: str, arguments: Sequence[str]) -> None:
    """Launch one node's part of a run, and exit with the run's exit code.

    Args:
        program: the name of the command for its help and its errors, such as `launch/pretrain.sh`.
        arguments: the command line after the program's name.

    Raises:
        UserError: an option, the model file or the run folder cannot be used, or node 0 cannot be reached.
    """
    # Until the ranks run, there is nothing to save. The supervisor installs its own handlers later.
    for number in SIGNALS_THAT_SAVE:
        signal.signal(number, lambda *_: sys.exit(EXIT_REQUEUE))

    # Combine the options, the model file and the user's flags into the flags of the run.
    options = parse_options(program, arguments, os.environ)
    model = ModelFile.read(options.model, {**os.environ, "RUN_DIR": str(options.run_dir)})
    processes, devices = options.gpus_per_node, None
    if processes is None or not (options.dry_run or options.check_only):
        devices = find_devices()
        processes = processes or devices.num_gpus or 1
    ranks = processes * options.nodes
    flags = run_flags(options, model.flags_for(ranks), split_flags(options.flags))
    if options.check_only:
        sys.exit(check(flags, ranks, None))

    # Build torchrun's command line.
    route = route_to(*options.rendezvous) if options.rendezvous else None
    command = torchrun_command(options, flags, processes, route, os.environ)
    if options.dry_run:
        print(command)
        return

    # A folder in which another run trains is refused before the first file of this run is written.
    if not options.node_rank and (save := flags.get("save")):
        check_unlocked(Path(save[0]))
    # Node 0 checks the settings for all nodes. The other nodes start when node 0 has passed the check.
    if options.rendezvous and options.node_rank:
        wait_for(*options.rendezvous, options.rendezvous_timeout)
    elif options.checks and check(flags, ranks, devices):
        sys.exit(EXIT_BAD_INPUT)
    try:
        options.log_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {options.log_folder}: {error.strerror}; choose another --run-dir") from error
    print(f"launch: {command}", flush=True)
    sys.exit(Supervisor(options.shutdown_timeout).run(command))


def check(flags: Flags, ranks: int, devices: Devices | None) -> int:
    """Run pretraining's `--check`, which prints what it finds, and return its exit code.

    Args:
        flags: the flags of the run.
        ranks: the number of ranks of the run.
        devices: the devices of this machine if it will run the ranks. None assumes GPUs unless the flags say otherwise.
    """
    if devices is not None and not devices.num_gpus:
        flags = override({"distributed-backend": ("gloo",)}, flags)
    words = (sys.executable, "-m", "maskmoe.training.pretrain", "--check", str(ranks), *flag_words(flags))
    variables = unset_variables(RUN_ENVIRONMENT, os.environ)
    return subprocess.run(words, env={**os.environ, **variables}, check=False).returncode
