"""Refuses to run the code of another checkout: `check_checkout.py ROOT`, run by the Python that will run MaskMoE."""

import sys
from pathlib import Path

import maskmoe

root, code = Path(sys.argv[1]).resolve(), Path(maskmoe.__file__).resolve().parents[1]
# An installed package, as in the container images, belongs to no checkout.
if code != root and (code / "launch" / "pretrain.sh").exists():
    sys.stderr.write(
        f"error: {sys.executable} runs the MaskMoE of another checkout, {code}, not of {root}: "
        f"run {root}/launch/setup.sh first, or use the scripts in {code}/launch\n"
    )
    sys.exit(2)
