"""Launches a training run of a model file on this node, or an entry point on this machine."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from maskmoe.arguments import ranges
from maskmoe.arguments.flags import split_flags
from maskmoe.arguments.parser import OneLineParser
from maskmoe.files.outputs import check_outputs, refuse_checkpoint
from maskmoe.launch.command import ENTRY_POINT_ENVIRONMENT, Command, run_flags, standalone_command, unset_variables
from maskmoe.launch.machine import find_devices, wait_for
from maskmoe.launch.model_file import ModelFile
from maskmoe.launch.node_run import NodeRun, Supervisor, check
from maskmoe.launch.options import Options, parse_options
from maskmoe.processes.folder_lock import check_unlocked
from maskmoe.processes.interruption import EXIT_REQUEUE, SHUTDOWN_TIMEOUT, handle_signals_that_end

_SINGLE_PROCESS_FLAGS = ("-h", "--help", "--help-all", "--check")


def launch(program: str, arguments: Sequence[str]) -> None:
    """Launch one node's part of a run, and exit with the run's exit code.

    Args:
        program: The name of the command for its help and its errors, such as `maskmoe pretrain`.
        arguments: The command line after the program's name.

    Raises:
        UserError: An option, the model file or the run folder cannot be used, or node 0 cannot be reached.
    """
    # Until the ranks run, there is nothing to save. The supervisor installs its own handlers later.
    handle_signals_that_end(lambda *_: sys.exit(EXIT_REQUEUE))
    options = parse_options(program, arguments, os.environ)
    refuse_checkpoint(options.run_dir)
    model = ModelFile.read(options.model, {**os.environ, "RUN_DIR": str(options.run_dir)})
    processes = options.gpus_per_node or find_devices().num_gpus or 1
    if options.nodes.is_elastic and not options.check_only:
        # A run whose nodes stay the same reads none of this code.
        from maskmoe.launch.elastic import ElasticRun

        sys.exit(ElasticRun(options, model, processes).run())
    run = _fixed_run(options, model, processes)
    if options.check_only:
        check_outputs(run.flags.get("json", ()), [options.model], force="force" in run.flags)
        sys.exit(check(run.flags, run.ranks))
    if options.dry_run:
        print(run.command)
        return
    sys.exit(_train(run))


def _fixed_run(options: Options, model: ModelFile, processes: int) -> NodeRun:
    """Return this node's part of a run whose nodes stay the same.

    Raises:
        UserError: The model file has no layout for the number of ranks.
    """
    ranks = processes * options.nodes.most
    if options.check_only and options.gpus_per_node is None and options.nodes.most == 1 and not model.fits(ranks):
        ranks = min(model.layouts)
        print(
            f"note: the report is for {ranks} ranks, the smallest layout of {model.path}; pass --nodes and "
            "--gpus-per-node for another",
            file=sys.stderr,
        )
    flags = run_flags(options, model.flags_for(ranks), split_flags(options.flags))
    return NodeRun(options, options.meeting, flags, processes, ranks)


def _train(run: NodeRun) -> int:
    """Run the ranks of this node as soon as node 0 can be reached, and return the run's exit code.

    Raises:
        UserError: The run folder cannot be used, or node 0 cannot be reached.
    """
    if run.meeting.endpoint and run.meeting.node_rank:
        wait_for(*run.meeting.endpoint, run.meeting.timeout)
    elif save := run.flags.get("save"):
        # A folder in which another run trains is refused before the first file of this run is written.
        check_unlocked(Path(save[0]))
    code = run.train(Supervisor(run.options.shutdown_timeout))
    run.record_end(code)
    return code


def run_entry_point(entry: Sequence[str], saves_checkpoints: bool) -> NoReturn:
    """Run an entry point with the arguments of `sys.argv`, and exit with its exit code.

    If torchrun started this process, the process becomes the rank. Otherwise torchrun is started with one rank for each
    GPU, or one rank without GPUs; `--nproc-per-node N` sets another number. `--help` and `--check` need no ranks, so
    torchrun is not started for them.

    Args:
        entry: What every rank runs, see `maskmoe.launch.command.entry_point`.
        saves_checkpoints: Whether the entry point saves a checkpoint when a signal stops it.

    Raises:
        UserError: `--nproc-per-node` has no valid value.
    """
    processes, arguments = split_processes(sys.argv[1:])
    # Schedulers may set RANK to the number of the node. Only torchrun also sets LOCAL_RANK.
    if "LOCAL_RANK" in os.environ or any(word.partition("=")[0] in _SINGLE_PROCESS_FLAGS for word in arguments):
        # Replace this program: Megatron's helper processes import the main module, which must be the entry point.
        os.execv(sys.executable, [sys.executable, "-P", "-u", *entry, *arguments])
    options = ("--local-addr", "127.0.0.1", "--shutdown-timeout", str(SHUTDOWN_TIMEOUT))
    words = standalone_command(processes or find_devices().num_gpus or 1, entry, arguments, options)
    supervisor = Supervisor(SHUTDOWN_TIMEOUT, saves_checkpoints)
    sys.exit(supervisor.run(Command(words, unset_variables(ENTRY_POINT_ENVIRONMENT, os.environ))))


def split_processes(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """Return the value of `--nproc-per-node`, None if it is not given, and the remaining words of a command line.

    Raises:
        UserError: The value is missing or is not a positive whole number.
    """
    parser = OneLineParser(add_help=False)
    parser.add_argument("--nproc-per-node", type=ranges.RANKS_OF_NODE)
    own, remaining = parser.parse_known_args(words)
    return own.nproc_per_node, remaining
