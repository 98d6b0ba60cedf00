"""The status of a run, running or ended, from its run folder alone.

`liveness`, `starts`, `checkpoints` and `load` read one part each, and `reader` combines the parts. `text` and `page`
show the result. Everything is only read, so the training never notices it. Nothing here imports torch, unless a
checkpoint without digests must be checked.
"""
