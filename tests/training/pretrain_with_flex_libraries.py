"""Pretraining on the CPU with stand-ins for the libraries of the flex dispatcher."""

import sys
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
from maskmoe.command_line.run_tool import run_tool
from maskmoe.training.trainer import main

sys.path.append(str(Path(__file__).parents[1]))
from support import flex_libraries

if __name__ == "__main__":
    flex_libraries.install()
    run_tool(main)
