"""Pretraining, evaluation and checks of a run.

The modules `pretrain`, `evaluate` and `check` are entry points: they prepare the process for Megatron, then import the
modules that do the work.
"""
