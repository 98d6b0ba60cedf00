"""Losses and gradient norms of four runs are those of `golden_losses.json`.

Most tests compare two runs of the same code, so a fault in both stays invisible; here it shows. The file says on which
processor its values were computed.
"""

import json
from pathlib import Path

import pytest

GOLDEN = json.loads((Path(__file__).parent / "golden_losses.json").read_text())["runs"]

# Processors add fp32 numbers in different orders. Kernels for AVX-512, for AVX2 and for neither, with and without
# MKL's reproducible mode, differ by at most 1.8e-7 in these runs. The smallest change of the method that a test knows,
# another mask, changes losses by more than 1e-4.
TOLERANCE = 2e-6


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.runs(name)) for name in GOLDEN])
def test_losses_are_the_golden_ones(runs, name, tmp_path):
    (run,) = runs
    golden = {scalar: {int(step): value for step, value in curve.items()} for scalar, curve in GOLDEN[name].items()}
    (tmp_path / "found.json").write_text(json.dumps({name: run.curves}))
    hint = f"if the change is meant, copy the values of {tmp_path}/found.json"
    assert {scalar: list(curve) for scalar, curve in run.curves.items()} == {
        scalar: list(curve) for scalar, curve in golden.items()
    }, hint
    for scalar, curve in golden.items():
        assert run.curves[scalar] == pytest.approx(curve, rel=TOLERANCE), f"{scalar}: {hint}"
