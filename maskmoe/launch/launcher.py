"""Launches a training run of a model file on this node, or an entry point on this machine, by becoming torchrun."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from maskmoe.arguments import ranges
from maskmoe.arguments.flags import flag_words, split_flags
from maskmoe.arguments.parser import OneLineParser
from maskmoe.errors import counted, refused_by_system
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import refuse_checkpoint
from maskmoe.launch.machine import find_devices, route_to
from maskmoe.launch.model_file import ModelFile
from maskmoe.launch.options import Options, parse_options
from maskmoe.launch.torchrun_command import (
    ENTRY_POINT_ENVIRONMENT,
    RUN_ENVIRONMENT,
    Command,
    entry_point,
    run_flags,
    split_program,
    standalone_command,
    torchrun_command,
    unset_variables,
)


def launch(program: str, arguments: Sequence[str]) -> None:
    """Launch one node's part of a run: this process becomes torchrun, whose exit code is that of the run.

    Args:
        program: The name of the command for its help and its errors, such as `maskmoe pretrain`.
        arguments: The command line after the program's name.

    Raises:
        UserError: An option, the model file or the run folder cannot be used.
    """
    options = parse_options(program, arguments, os.environ)
    refuse_checkpoint(options.run_dir)
    model = ModelFile.read(options.model, {**os.environ, "RUN_DIR": str(options.run_dir)})
    processes = options.nproc_per_node or find_devices().num_gpus or 1
    if options.check_only:
        sys.exit(_check(options, model, processes))
    for nodes in range(options.nodes.least, options.nodes.most + 1):
        split_program(run_flags(options.run_dir, model.flags_for(nodes * processes), split_flags(options.flags)))
    route = route_to(*options.rendezvous) if options.rendezvous else None
    command = torchrun_command(options, processes, route, os.environ)
    if options.dry_run:
        print(command)
        return
    with refused_by_system(f"cannot make {options.log_folder}", "choose another --run-dir"):
        options.log_folder.mkdir(parents=True, exist_ok=True)
        (options.log_folder / "command.txt").write_text(f"{command}\n", encoding="utf-8")
    waiting = f" when {options.nodes} nodes are there" if options.rendezvous else ""
    print(f"launch: starting {counted(processes, 'rank')}{waiting}; everything is in {options.run_dir}")
    _become(command)


def run_entry_point(entry: Sequence[str], arguments: Sequence[str]) -> NoReturn:
    """Run an entry point as ranks on this machine: this process becomes torchrun, or the entry point for `--help-all`.

    Args:
        entry: What every rank runs, see `maskmoe.launch.torchrun_command.entry_point`.
        arguments: The entry point's arguments. `--nproc-per-node N` sets the number of ranks, by default one for each
            GPU, or one without GPUs.

    Raises:
        UserError: `--nproc-per-node` has no valid value.
    """
    parser = OneLineParser(add_help=False)
    parser.add_argument("--nproc-per-node", type=ranges.PROCESSES)
    own, remaining = parser.parse_known_args(arguments)
    words = (sys.executable, *entry, *remaining)
    if "--help-all" not in remaining:
        processes = own.nproc_per_node or find_devices().num_gpus or 1
        words = standalone_command(processes, entry, remaining, ("--local-addr", "127.0.0.1"))
    _become(Command(words, unset_variables(ENTRY_POINT_ENVIRONMENT, os.environ)))


def _become(command: Command) -> NoReturn:
    """Replace this program by a command."""
    sys.stdout.flush()
    os.execve(command.words[0], command.words, {**os.environ, **command.environment})


def _check(options: Options, model: ModelFile, processes: int) -> int:
    """Check the run, which prints errors to stderr and a report to stdout; return the exit code.

    Raises:
        UserError: The model file has no layout for the number of ranks, or a file of the report cannot be written.
    """
    ranks = processes * options.nodes.most
    if options.nproc_per_node is None and options.nodes.most == 1 and not model.fits(ranks):
        ranks = min(model.layouts)
        print(
            f"note: the report is for {ranks} ranks, the smallest layout of {model.path}; pass --nodes and "
            "--nproc-per-node for another",
            file=sys.stderr,
        )
    flags = run_flags(options.run_dir, model.flags_for(ranks), split_flags(options.flags))
    check_outputs([Path(path) for path in flags.get("json", ())], [options.model], force="force" in flags)
    program, flags = split_program(flags)
    words = (sys.executable, *entry_point("check", program), "--check", str(ranks), *flag_words(flags))
    environment = {**os.environ, **unset_variables(RUN_ENVIRONMENT, os.environ)}
    return subprocess.run(words, env=environment, check=False).returncode
