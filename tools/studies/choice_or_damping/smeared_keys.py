"""Trains or evaluates with `SmearedKeysBuilder`: `python smeared_keys.py pretrain|evaluate FLAGS…`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # ranks run with PYTHONSAFEPATH
from study_program import run

run("SmearedKeysBuilder", __name__)
