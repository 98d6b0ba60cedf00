"""The program of each rank of a model file: `python -m maskmoe.launch.rank MODEL.yaml FLAGS…`, started by torchrun.

torchrun may start the ranks again on fewer or more nodes, so only a rank knows for how many ranks the layout is.
"""

import os
import signal
import sys
from pathlib import Path

from maskmoe.arguments.flags import flag_words, split_flags
from maskmoe.files.run_folder import RUN_FOLDER_VARIABLE
from maskmoe.launch.model_file import ModelFile
from maskmoe.launch.torchrun_command import entry_point, run_flags, split_program
from maskmoe.processes.interruption import end_with_parent
from maskmoe.processes.run_tool import run_tool


def main() -> None:
    """Take the layout for `WORLD_SIZE`, and become the entry point, so that torchrun watches the entry point.

    Raises:
        UserError: The model file cannot be read, or has no layout for the number of ranks.
    """
    end_with_parent(os.getppid(), signal.SIGTERM)  # torchrun may be killed
    run_dir = Path(os.environ[RUN_FOLDER_VARIABLE])
    model = ModelFile.read(Path(sys.argv[1]), {**os.environ, "RUN_DIR": str(run_dir)})
    flags = run_flags(run_dir, model.flags_for(int(os.environ["WORLD_SIZE"])), split_flags(sys.argv[2:]))
    program, flags = split_program(flags)
    # Megatron's helper processes import the main module, which must be the entry point.
    os.execv(sys.executable, [sys.executable, "-u", *entry_point("pretrain", program), *flag_words(flags)])


if __name__ == "__main__":
    run_tool(main)
