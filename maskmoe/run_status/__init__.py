"""The status of a run, running or ended, from what its run folder holds.

`arguments`, `scalars`, `progress`, `liveness` and `checkpoints` read one part each, and `status` combines the parts.
`text` and `page` show the result. Everything is only read, so the training never notices it. Nothing here imports
torch, unless a checkpoint without digests must be checked.
"""
