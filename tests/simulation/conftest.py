import sys
from pathlib import Path

from hypothesis import settings

# Makes `small_cases` importable, also by the test modules: pytest leaves the import path alone.
sys.path.append(str(Path(__file__).parent))

# No test fails for being slow on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
