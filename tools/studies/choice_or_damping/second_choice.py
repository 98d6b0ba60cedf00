"""Evaluates with `SecondChoiceBuilder`: `python second_choice.py evaluate FLAGS…`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # ranks run with PYTHONSAFEPATH
from study_program import run

run("SecondChoiceBuilder", __name__)
