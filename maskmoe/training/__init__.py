"""Pretraining, evaluation and generation under torchrun.

The modules `pretrain`, `evaluate` and `generate` are entry points: they prepare the process for Megatron, then import
the modules that do the work. `console` decides what reaches the terminal.
"""
