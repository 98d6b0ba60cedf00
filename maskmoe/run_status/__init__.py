"""The status of a run, running or ended, from what its run folder holds.

`events` and `checkpoints` read one part each, `status` combines everything, and `report` shows the result. Everything
is only read, so the training never notices it. Nothing here imports torch, unless a checkpoint without digests must be
checked.
"""
