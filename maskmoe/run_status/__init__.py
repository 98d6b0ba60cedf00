"""Reads the state of a run from its folder: how far the run is, and which of its checkpoints are intact.

Everything is only read, so that the training never notices. Nothing here imports torch, unless a checkpoint without
digests must be checked.
"""
