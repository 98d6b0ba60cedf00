"""Commands in a row, each done once however often the work is interrupted; what quickstart and comparison share.

Every stage is a command that a user could type. This package runs them, shows their progress, and continues where an
earlier start was interrupted. It imports neither torch nor megatron.
"""
