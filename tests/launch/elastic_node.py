"""The launcher of one node of an elastic run, with other programs than torchrun and with short times.

Usage: elastic_node.py HOST arguments of launch/pretrain.sh. The program that stands for the ranks of the node obeys
files in the run folder: `finish`, `fail-RANK_OF_NODE` and `go-back-GENERATION` end it, and `saved` stands for a
checkpoint. The variable `MOST_SECONDS` makes the clock of the folder run slower, as a slow file system does.
"""

import os
import socket
import sys
from pathlib import Path

from maskmoe.arguments import ranges
from maskmoe.launch import elastic, elastic_files, launcher, node_run
from maskmoe.launch.command import Command
from maskmoe.launch.machine import Devices
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.processes.run_tool import run_tool

RANKS = """
import os, pathlib, signal, sys, time
from maskmoe.processes.interruption import leave_exit_code
folder, generation, node_rank = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
stopped = folder / f"stopped-{generation}"
signal.signal(signal.SIGTERM, lambda *_: stopped.touch())
(folder / f"began-{generation}-{node_rank}").write_text(" ".join(sys.argv[4:]))
while not (folder / "finish").exists():
    time.sleep(0.02)
    if (folder / f"fail-{node_rank}").exists():
        sys.exit(3)
    if (folder / "saved").exists() and pathlib.Path(os.environ["MASKMOE_LEAVE_FILE"]).exists():
        stopped.touch()
    if stopped.exists() or (folder / f"go-back-{generation}").exists():
        leave_exit_code(REQUEUE)
        sys.exit(1)
""".replace("REQUEUE", str(EXIT_REQUEUE))


def fake_command(options, meeting, flags, processes, route, environment) -> Command:
    """Return the command of the program that stands for the ranks."""
    layout = [f"{name}={'/'.join(words)}" for name, words in sorted(flags.items()) if "parallel" in name]
    words = (str(options.run_dir), meeting.name.rpartition(".")[2], str(meeting.node_rank), *layout)
    return Command((sys.executable, "-c", RANKS, *words), {})


def main() -> None:
    host = sys.argv[1]
    socket.gethostname = lambda: host
    elastic_files._BEAT_SECONDS = 0.4
    elastic_files._MOST_SECONDS = float(os.environ.get("MOST_SECONDS", elastic_files._MOST_SECONDS))
    ranges.NODE_TIMEOUT = ranges.SECONDS
    elastic._LOOK_SECONDS, elastic._POLL_SECONDS, elastic._BEATS_SECONDS = 0.1, 0.05, 0.5
    node_run.torchrun_command = fake_command
    elastic.check = lambda *arguments, **options: 0
    # The stand-in of the first node's ranks does not listen.
    elastic.connection_error = lambda *address: None
    # A host is cut off from the network while this file exists.
    cut = Path(sys.argv[sys.argv.index("--run-dir") + 1]) / f"cut-{host}"
    connect = elastic_files.connection_error
    elastic_files.connection_error = lambda *address: OSError() if cut.exists() else connect(*address)
    launcher.find_devices = elastic.find_devices = lambda: Devices(0, 1)
    launcher.launch("elastic_node.py", sys.argv[2:])


if __name__ == "__main__":
    run_tool(main)
