"""`launch/pretrain.sh`: from a model file and flags to a run under torchrun, on one node or many.

`options` reads the command line and the environment, `model_file` the YAML file, `command` makes torchrun's command
line of both, `supervisor` runs it.
"""
