"""Trains or evaluates with `GatedHashBuilder`: `python gated_hash.py pretrain|evaluate FLAGS…`."""

from study_program import run

run("GatedHashBuilder", __name__)
