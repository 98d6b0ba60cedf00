"""Trains or evaluates with `UnitWeightBuilder`: `python unit_weight.py pretrain|evaluate FLAGS…`."""

from study_program import run

run("UnitWeightBuilder", __name__)
