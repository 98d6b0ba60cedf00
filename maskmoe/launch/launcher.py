"""Launches a training run: reads the options and the model file, and runs this node's ranks."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from maskmoe.launch.command import run_flags
from maskmoe.launch.devices import find_devices
from maskmoe.launch.model_file import ModelFile, split_flags
from maskmoe.launch.network import wait_for
from maskmoe.launch.node_run import NodeRun, check
from maskmoe.launch.options import Options, parse_options
from maskmoe.launch.supervisor import Supervisor
from maskmoe.processes.folder_lock import check_unlocked
from maskmoe.processes.interruption import EXIT_REQUEUE, handle_signals_that_end


def launch(program: str, arguments: Sequence[str]) -> None:
    """Launch one node's part of a run, and exit with the run's exit code.

    Args:
        program: the name of the command for its help and its errors, such as `maskmoe pretrain`.
        arguments: the command line after the program's name.

    Raises:
        UserError: an option, the model file or the run folder cannot be used, or node 0 cannot be reached.
    """
    # Until the ranks run, there is nothing to save. The supervisor installs its own handlers later.
    handle_signals_that_end(lambda *_: sys.exit(EXIT_REQUEUE))
    options = parse_options(program, arguments, os.environ)
    model = ModelFile.read(options.model, {**os.environ, "RUN_DIR": str(options.run_dir)})
    processes = options.gpus_per_node or find_devices().num_gpus or 1
    if options.nodes.is_elastic:
        # A run whose nodes stay the same reads none of this code.
        from maskmoe.launch.elastic.run import ElasticRun, first_node_run

        if not (options.dry_run or options.check_only):
            sys.exit(ElasticRun(options, model, processes).run())
        run = first_node_run(options, model, processes)
    else:
        run = _fixed_run(options, model, processes)
    if options.check_only:
        sys.exit(check(run.flags, run.ranks))
    if options.dry_run:
        print(run.command)
        return
    sys.exit(_train(run))


def _fixed_run(options: Options, model: ModelFile, processes: int) -> NodeRun:
    """Return this node's part of a run whose nodes stay the same.

    Raises:
        UserError: the model file has no layout for the number of ranks.
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
        UserError: the run folder cannot be used, or node 0 cannot be reached.
    """
    if run.meeting.endpoint and run.meeting.node_rank:
        wait_for(*run.meeting.endpoint, run.meeting.timeout)
    elif save := run.flags.get("save"):
        # A folder in which another run trains is refused before the first file of this run is written.
        check_unlocked(Path(save[0]))
    code = run.train(Supervisor(run.options.shutdown_timeout))
    run.record_end(code)
    return code
