"""Trains or evaluates with `GatedHashBuilder`: `python gated_hash.py pretrain|evaluate FLAGS…`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # ranks run with PYTHONSAFEPATH
from study_program import run

run("GatedHashBuilder", __name__)
