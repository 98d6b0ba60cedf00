"""The launcher: starts a training run under torchrun, on one node or many.

`options` reads the command line and the environment variables, `model_file` reads the YAML file, `command` builds
torchrun's command line from both, `supervisor` runs the command, and `launcher` calls them in this order.
`entry_point` runs one entry point on this machine, without a model file. `ranks` is torchrun without its own report of
failures, and `run_folder` finds the folder of a run.
"""
