"""Trains or evaluates with `SmearedKeysBuilder`: `python smeared_keys.py pretrain|evaluate FLAGS…`."""

from study_program import run

run("SmearedKeysBuilder", __name__)
