"""Runs that train on while nodes come and go: `launch/pretrain.sh --nodes MIN:MAX`.

torchrun cannot do this alone: all of its agents meet at one of the nodes and are lost with that node, and the ranks of
all restarts get the same flags. So the launchers of the nodes agree on each part of the run, a *generation*, by files
of the run folder, which all nodes see:

- `membership` makes this node's launcher known to the other launchers, and watches which launchers are there;
- `generation` is the agreement: which nodes train with which flags. Each generation is a separate start of torchrun;
- `layout` chooses how many of the nodes train, and with which flags;
- `run` trains one generation after the other.

One launcher leads: it writes the generations. Every launcher finds out alone which launcher leads. If two launchers
think that they lead, only one of them can write the next generation, and the lock of the run folder lets only one of
two trainings write checkpoints.
"""
