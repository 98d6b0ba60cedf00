import sys
from pathlib import Path

# Makes `tiny_maskmoe`, and `small_moe` of the tests of transformer/, importable: pytest leaves the import path alone.
HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "transformer")]
