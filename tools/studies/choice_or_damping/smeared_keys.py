"""Trains or evaluates with `SmearedKeysBuilder`: `python smeared_keys.py pretrain|evaluate FLAGS…`."""

import sys
from importlib import import_module
from pathlib import Path

from maskmoe import run_program

sys.path.insert(0, str(Path(__file__).parent))  # ranks run with PYTHONSAFEPATH
run_program(__name__, lambda: import_module("interventions").SmearedKeysBuilder)
