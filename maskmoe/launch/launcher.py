"""Launches a training run: checks the settings, makes the run folder, and runs torchrun."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from maskmoe.command_line.run_tool import EXIT_BAD_INPUT
from maskmoe.errors import counted
from maskmoe.launch.command import Command, run_flags, torchrun_command
from maskmoe.launch.devices import Devices, find_devices
from maskmoe.launch.elastic.run import ElasticRun, check_node_counts, first_command
from maskmoe.launch.journal import Journal
from maskmoe.launch.model_file import Flags, ModelFile, split_flags
from maskmoe.launch.network import route_to, wait_for
from maskmoe.launch.options import Options, parse_options
from maskmoe.launch.preparation import check, record_end, record_launch, record_start
from maskmoe.launch.supervisor import Supervisor
from maskmoe.processes.folder_lock import check_unlocked
from maskmoe.processes.interruption import EXIT_REQUEUE, handle_signals_that_end


def launch(program: str, arguments: Sequence[str]) -> None:
    """Launch one node's part of a run, and exit with the run's exit code.

    Args:
        program: the name of the command for its help and its errors, such as `launch/pretrain.sh`.
        arguments: the command line after the program's name.

    Raises:
        UserError: an option, the model file or the run folder cannot be used, or node 0 cannot be reached.
    """
    # Until the ranks run, there is nothing to save. The supervisor installs its own handlers later.
    handle_signals_that_end(lambda *_: sys.exit(EXIT_REQUEUE))

    # Combine the options, the model file and the user's flags into the flags of the run.
    options = parse_options(program, arguments, os.environ)
    model = ModelFile.read(options.model, {**os.environ, "RUN_DIR": str(options.run_dir)})
    processes, devices = options.gpus_per_node, None
    if processes is None or not (options.dry_run or options.check_only):
        devices = find_devices()
        processes = processes or devices.num_gpus or 1
    ranks = processes * options.nodes.most
    if options.check_only and options.gpus_per_node is None and options.nodes.most == 1 and not model.fits(ranks):
        ranks = min(model.layouts)
        print(
            f"note: the report is for {ranks} ranks, the smallest layout of {model.path}; pass --nodes and "
            "--gpus-per-node for another",
            file=sys.stderr,
        )
    if options.nodes.is_elastic:
        if options.check_only:
            sys.exit(check_node_counts(options, model, processes))
        if options.dry_run:
            print(first_command(options, model, processes))
            print(
                "note: the command is that of the first node; the nodes choose the first node and PORT when they meet",
                file=sys.stderr,
            )
            return
        assert devices is not None
        sys.exit(ElasticRun(options, model, processes, devices).run())
    flags = run_flags(options, model.flags_for(ranks), split_flags(options.flags))
    if options.check_only:
        sys.exit(check(flags, ranks, None).returncode)
    route = route_to(*options.rendezvous) if options.rendezvous else None
    command = torchrun_command(options, options.meeting, flags, processes, route, os.environ)
    if options.dry_run:
        print(command)
        return
    sys.exit(_run(options, flags, processes, devices, command))


def _run(options: Options, flags: Flags, processes: int, devices: Devices | None, command: Command) -> int:
    """Check the run, run torchrun's command, and return the run's exit code.

    Args:
        options: the launcher's options.
        flags: the flags of the run.
        processes: the number of ranks of this node.
        devices: the devices of this machine.
        command: torchrun's command line.

    Raises:
        UserError: the run folder cannot be used, or node 0 cannot be reached.
    """
    # A folder in which another run trains is refused before the first file of this run is written.
    if not options.node_rank and (save := flags.get("save")):
        check_unlocked(Path(save[0]))
    is_verbose, report = "verbose" in flags, None
    # Node 0 checks the settings for all nodes. The other nodes start when node 0 has passed the check.
    if options.rendezvous and options.node_rank:
        wait_for(*options.rendezvous, options.rendezvous_timeout)
    elif options.checks:
        print("launch: checking settings and files", flush=True)
        checked = check(flags, processes * options.nodes.most, devices, to_console=is_verbose)
        if checked.returncode:
            return EXIT_BAD_INPUT
        report = checked.stdout
    record_start(options, options.log_folder(options.node_rank), command, report)
    if is_verbose:
        print(f"launch: {command}", flush=True)
    else:
        print(f"launch: starting {counted(processes, 'rank')}; everything is in {options.run_dir}")
        sys.stdout.flush()
    # The launcher of the first node writes for all launchers, so that the journal has each start once.
    journal = Journal(None if options.node_rank else options.run_dir)
    record_launch(journal, processes * options.nodes.most, options.nodes.most)
    code = Supervisor(options.shutdown_timeout).run(command)
    record_end(journal, code)
    return code
