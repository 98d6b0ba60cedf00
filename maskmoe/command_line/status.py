"""Show the status of a running or ended training run from its run folder alone.

The status has progress and ETA, losses and tokens per second, the load of each MoE layer, the starts and how they
ended, warnings, changes of the nodes, and the checkpoints: whether they are sound, and which one a restart would load.
The run is not disturbed: this command only reads.

Example:
  %(prog)s runs/laptop --watch 10
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from maskmoe.command_line import ranges
from maskmoe.command_line.arguments import command_parser, inputs_of_run
from maskmoe.command_line.parser import add_force_argument
from maskmoe.command_line.progress import say_loading
from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output, check_outputs
from maskmoe.files.paths import check_folder

if TYPE_CHECKING:
    from maskmoe.run_status.status import Status
    from maskmoe.run_status.watch import Screen

_STDOUT = "-"


def main() -> None:
    """Show or write the status of the run that the command line names.

    Raises:
        UserError: the folder is no run folder, or an output cannot be written.
    """
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="run folder, of a run that works or has ended")
    add("--tensorboard-dir", type=Path, metavar="DIR", help="folder of the event files, if it is another one")
    add("--html", type=Path, metavar="FILE", help="also write the status as an HTML page")
    add("--json", metavar="FILE", help="also write the status as JSON; with -, print JSON instead of the text")
    add("--watch", type=ranges.PAUSE, metavar="SECONDS", help="update after this time, until the run ends or Ctrl-C")
    meaning = "compare all files of the checkpoints with their digests, which reads all of their bytes"
    add("--verify", action="store_true", help=meaning)
    add_force_argument(parser)
    arguments = parser.parse_args()
    check_folder(arguments.run)
    if arguments.tensorboard_dir is not None:
        check_folder(arguments.tensorboard_dir, "--tensorboard-dir")
    outputs = [arguments.html, None if arguments.json == _STDOUT else arguments.json]
    check_outputs(filter(None, outputs), inputs_of_run(arguments.run, arguments.tensorboard_dir), arguments.force)

    # Only now, since these imports take time and `--help` does not need them.
    from maskmoe.run_report.events import event_files
    from maskmoe.run_status.checkpoints import CheckpointReader
    from maskmoe.run_status.reader import StatusReader
    from maskmoe.run_status.watch import Screen, follow

    if arguments.tensorboard_dir is not None and not event_files(arguments.tensorboard_dir):
        raise UserError(f"--tensorboard-dir {arguments.tensorboard_dir} holds no event files")
    checkpoints = CheckpointReader(say_loading, _verification if arguments.verify else None)
    reader = StatusReader(arguments.run, arguments.tensorboard_dir, checkpoints, say_loading)
    if arguments.watch is None:
        _write(reader.read(), arguments, None)
        return
    screen = Screen(sys.stdout)
    follow(reader.read, lambda status: _write(status, arguments, screen), arguments.watch)


def _write(status: "Status", arguments: Namespace, screen: "Screen | None") -> None:
    """Write the files and print the text, or JSON.

    Args:
        status: the status.
        arguments: the command line.
        screen: shows the text of a run that is watched; None prints the text once.
    """
    from maskmoe.run_status.liveness import State
    from maskmoe.run_status.plot import glyphs_for
    from maskmoe.run_status.text import render_text

    if arguments.html is not None:
        from maskmoe.run_status.page import write_status_page

        is_updated = arguments.watch is not None and status.liveness.state is State.RUNNING
        write_status_page(status, arguments.html, max(1, round(arguments.watch)) if is_updated else None)
    if arguments.json is not None:
        content = json.dumps(status.to_json())
        if arguments.json == _STDOUT:
            print(content, flush=True)
            return
        with atomic_output(Path(arguments.json)) as temporary:
            temporary.write_text(f"{content}\n", encoding="utf-8")
    text = render_text(status, glyphs_for(sys.stdout.encoding))
    if screen is None:
        print(text, end="")
    else:
        screen.show(text)


@contextmanager
def _verification(checkpoint: Path, size: int) -> Iterator[Callable[[int], object]]:
    """Show how much of a checkpoint is verified, on stderr; yield the function that adds the size of a file."""
    from tqdm import tqdm

    with tqdm(total=size, desc=f"verifying {checkpoint.name}", unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update
