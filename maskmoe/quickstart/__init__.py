"""From text to a trained, evaluated language model on this machine: `python -m maskmoe.quickstart`.

Every stage is a command that a user could type. This package puts them in order, shows their progress, and continues
where an earlier run was interrupted. It imports neither torch nor megatron.
"""
