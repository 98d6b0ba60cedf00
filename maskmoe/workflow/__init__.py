"""Run a plan of stages, each finished once however often the work is interrupted.

Every stage is a command that a user could type. The quickstart and the comparison define their stages, and this package
starts the commands, shows their progress and resumes after an interruption. The package imports neither torch nor
Megatron.
"""
