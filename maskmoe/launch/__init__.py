"""The launcher: starts a training run under torchrun, on one node or many.

`options` reads the command line and the environment variables, `model_file` the YAML file. `launcher` checks both,
builds torchrun's command line by `torchrun_command`, and becomes torchrun. `agent` is torchrun that does not restart
what restarts cannot help. Each rank runs `rank`, which takes the layout of the model file for the number of ranks.
`machine` finds the GPUs, cores and addresses of this machine.
"""
