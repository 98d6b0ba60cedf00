"""The launcher: starts a training run under torchrun, on one node or many.

`launcher` reads top to bottom: `options` reads the command line and the environment variables, `model_file` the YAML
file, `command` builds torchrun's command line from both, and `node_run` runs one node's ranks by it. `elastic` starts
the ranks again and again while nodes come and go; the launchers agree by the files of `elastic_files`. `launcher` also
runs one entry point on this machine, without a model file.

`ranks` is torchrun without its own report of failures. `machine` finds the GPUs, cores and addresses of this machine.
"""
